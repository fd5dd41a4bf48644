"""A decoder whose layers are arrays of their own.

A scan over stacked layers slices every weight at every token, and on CPU each
slice is a copy as large as the arithmetic that follows. A loop over tokens
reads by :class:`Layerwise` instead: every weight and every layer's cache is an
array of its own, laid out as the products are fastest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.models.attention.cache import Cache, fold_heads
from topd_jax.models.attention.core import prepare_mask
from topd_jax.models.attention.masks import Mask
from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder, check_call, layer_arrays
from topd_jax.models.layers import (
    TOGETHER,
    embed,
    final_norm,
    layer,
    layer_options,
)
from topd_jax.models.parameters import arrays_of
from topd_jax.models.rope import rope_table
from topd_jax.parallel.sharding import mesh_in_use
from topd_jax.types import Head


@struct.dataclass
class Layerwise:
    """A decoder of separate layers: a :class:`LanguageModel` without a mesh.

    Attributes:
      layers: parameter name -> array, one dictionary per layer.
      embedding: [V, D].
      head: [V, D].
      final_norm: [D].
      rope: cos and sin of every position that it reads at, of
        :func:`~topd_jax.models.rope.rope_table`.
      config: static shape.
    """

    reads_intervals = True  # see mask_for
    layers: tuple[dict[str, jax.Array], ...]
    embedding: jax.Array
    head: Head
    final_norm: jax.Array
    rope: tuple[jax.Array, jax.Array]
    config: DecoderConfig = struct.field(pytree_node=False)

    @property
    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return none: it is on no mesh."""
        return {}

    def init_cache(
        self, batch: int, length: int, branches: int = 0
    ) -> tuple[Cache, ...]:
        """Make an empty cache of every layer; see ``Decoder.init_cache``."""
        cache = Decoder.init_cache(self, batch, length, branches)
        return split_cache(self.config, cache)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        cache: tuple[Cache, ...] | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Read tokens as ``Decoder.__call__``, with one cache per layer."""
        check_call(tokens, positions, mask)
        c = self.config
        hidden = embed(self.embedding, tokens, c)
        rope = tuple(
            jnp.take(x[:, 0], positions, axis=1, mode="clip") for x in self.rope
        )
        caches = [None] * c.layers if cache is None else cache
        spec, noted = prepare_mask(c, positions, mask, caches[0])
        options = layer_options(c)
        updated = []
        for i, (weights, own) in enumerate(
            zip(self.layers, caches, strict=True)
        ):
            of_layer = {name: x[i] for name, x in options.items()}
            if own is not None:
                own = own.replace(positions=noted.positions)
            hidden, own = layer(
                c, (hidden, own), weights, of_layer | {"index": None},
                rope=rope, spec=spec,
            )  # fmt: skip
            if own is not None:
                own = own.replace(length=own.length + tokens.shape[1])
            updated.append(own)
        hidden = final_norm(hidden, self.final_norm, c)
        return hidden, None if cache is None else tuple(updated)


def unstack(model: Any, length: int) -> Any:
    """Return the model that a loop over tokens should read by.

    Args:
      model: any model.
      length: above every position that is read at; nothing checks it, and
        what is beyond turns as the last one.

    Returns:
      A :class:`Layerwise`, with caches of its own form, where the model is a
      decoder whose config unrolls the stack, and there is no mesh; else the
      model. Deep models (``unroll`` below ``layers``) stay stacked and compile
      in constant time.
    """
    if not isinstance(model, Decoder) or mesh_in_use():
        return model
    config, arrays = model.config, layer_arrays(model)
    if config.unroll < config.layers:
        return model
    each = (arrays_of(config, arrays, i) for i in range(config.layers))
    # Without the barrier the slices would move into the loop that uses them,
    # and sines and cosines into every product of every layer.
    layers, rope = jax.lax.optimization_barrier(
        (
            tuple(_merge_kernels(w, config) for w in each),
            rope_table(jnp.arange(length)[None], config),
        )
    )
    embedding, norm = model.embedding[...], model.final_norm[...]
    return Layerwise(layers, embedding, model.head, norm, rope, config)


def split_cache(config: DecoderConfig, cache: Cache) -> tuple[Cache, ...]:
    """Return what each layer of a decoder keeps, for :class:`Layerwise`.

    Args:
      config: the decoder's shape.
      cache: of all layers.
    """

    def one(recurrent: bool, index: int) -> Cache:
        own = dict.fromkeys(("keys", "values", "states", "inputs"))
        if recurrent:
            own |= dict(states=cache.states[index], inputs=cache.inputs[index])
        else:
            folded = fold_heads(cache.keys[index], cache.values[index])
            own |= dict(zip(("keys", "values"), folded, strict=True))
        return cache.replace(**own)

    recurrent = config.recurrent or (False,) * config.layers
    return tuple(map(one, recurrent, layer_options(config)["index"].tolist()))


def _merge_kernels(
    w: dict[str, jax.Array], config: DecoderConfig
) -> dict[str, jax.Array]:
    """Merge the kernels of a layer that read the same: one product, not three.

    Args:
      w: this layer's parameters.
      config: the decoder's shape.

    Returns:
      The same with "q+k+v" [D, q + k + v] and "gate+up" [D, 2F] in the place of
      those that are floats without adapters.
    """
    w, adapted = dict(w), config.lora.targets if config.lora else ()
    for together in TOGETHER:
        names = together.split("+")
        plain = (isinstance(w.get(name), jax.Array) for name in names)
        if all(plain) and not set(names) & set(adapted):
            kernels = [w.pop(name) for name in names]
            kernels = [x.reshape(len(x), -1) for x in kernels]
            w[together] = jnp.concatenate(kernels, axis=-1)
    return w
