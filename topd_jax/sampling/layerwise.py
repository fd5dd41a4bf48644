"""Prepare a model and its cache for a loop over tokens.

A scan over stacked layers slices every weight at every token, and on CPU each
slice is a copy as large as the arithmetic that follows. Where the config
unrolls the whole stack, the layers are unstacked once, before the loop: every
weight and every layer's cache is an array of its own. Deep models (``unroll``
below ``layers``) stay stacked and compile in constant time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.models.attention.core import prepare_mask
from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder, layer_arrays
from topd_jax.models.layers import embed, layer, layer_options, rms_norm
from topd_jax.models.rope import rope_table
from topd_jax.parallel.sharding import mesh_in_use


@struct.dataclass
class Layerwise:
    """A decoder whose layers are separate arrays; called as the decoder is.

    Attributes:
      layers: parameter name -> array, one dictionary per layer.
      embedding: [V, D].
      final_norm: [D].
      rope: cos and sin of every position that the loop reads at, of
        :func:`~topd_jax.models.rope.rope_table`.
      config: static shape.
    """

    layers: tuple[dict[str, jax.Array], ...]
    embedding: jax.Array
    final_norm: jax.Array
    rope: tuple[jax.Array, jax.Array]
    config: DecoderConfig = struct.field(pytree_node=False)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        caches: tuple[Any, ...],
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Read tokens as ``Decoder.__call__``, with one cache per layer."""
        c = self.config
        hidden = embed(self.embedding, tokens, c)
        rope = tuple(
            jnp.take(x[:, 0], positions, axis=1, mode="clip") for x in self.rope
        )
        spec, noted = prepare_mask(c, positions, mask, caches[0])
        options = layer_options(c)
        updated = []
        for i, (weights, cache) in enumerate(
            zip(self.layers, caches, strict=True)
        ):
            own = {name: x[i] for name, x in options.items()} | {"index": None}
            carry = (hidden, cache.replace(positions=noted.positions))
            hidden, cache = layer(
                c, carry, weights, own,
                rope=rope, spec=spec,
            )  # fmt: skip
            length = cache.length + tokens.shape[1]
            updated.append(cache.replace(length=length))
        return rms_norm(hidden, self.final_norm, c), tuple(updated)


def unstack(model: Any, cache: Any, length: int) -> tuple[Any, Any]:
    """Return the model and cache that a loop over tokens should use.

    Args:
      model: any model.
      cache: one that it has written.
      length: above every position that the loop reads at.

    Returns:
      (model, cache) to be called as before: layer by layer where the model is
      a decoder whose config unrolls the stack, else what was given.
    """
    if not isinstance(model, Decoder):
        return model, cache
    config = model.config
    if config.unroll < config.layers:
        return model, cache
    layers = range(config.layers)
    arrays = layer_arrays(model)
    # Without the barrier the slices would move into the loop that uses them,
    # and sines and cosines into every product of every layer.
    weights, caches, rope = jax.lax.optimization_barrier(
        (
            tuple({n: x[i] for n, x in arrays.items()} for i in layers),
            tuple(_cache_of(cache, i) for i in layers),
            rope_table(jnp.arange(length)[None], config),
        )
    )
    embedding, norm = model.embedding[...], model.final_norm[...]
    return Layerwise(weights, embedding, norm, rope, config), caches


def _cache_of(cache: Any, index: int) -> Any:
    keys, values = cache.keys[index], cache.values[index]
    if mesh_in_use() is None:
        # As the products of attention take them. What lies between a write
        # and its reader, XLA would write twice, and copy the cache for it.
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
    return cache.replace(keys=keys, values=values)


def repeat_rows(model: Any, cache: Any, times: int) -> Any:
    """Repeat each row of a cache ``times`` times, consecutively.

    Args:
      model: whose ``init_cache`` tells which dimension the rows are.
      cache: of that model.
      times: copies of each row.

    Returns:
      The cache of ``times`` as many rows.
    """
    if times == 1:
        return cache
    grown = [
        jnp.repeat(x, times, axis=per_row.index(1)) if 1 in per_row else x
        for x, per_row in zip(
            jax.tree.leaves(cache),
            _growth(model, (1, 1), (2, 1)),
            strict=True,
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(cache), grown)


def add_columns(model: Any, cache: Any, extra: int) -> Any:
    """Add empty columns to a cache.

    Args:
      model: whose ``init_cache`` tells which dimension the columns are.
      cache: stacked, or one per layer.
      extra: columns to add behind the others.

    Returns:
      The same with ``extra`` empty columns.
    """
    if extra == 0:
        return cache
    growth = _growth(model, (1, 1), (1, 2))
    leaves, structure = jax.tree.flatten(cache)
    grown = []
    for i, x in enumerate(leaves):
        # One per layer lacks leading dimensions, which do not grow.
        own = growth[i % len(growth)][-x.ndim :]
        pad = [(0, extra * more) for more in own]
        grown.append(jnp.pad(x, pad) if x.ndim else x)
    return jax.tree.unflatten(structure, grown)


def _growth(
    model: Any, small: tuple[int, int], large: tuple[int, int]
) -> list[list[int]]:
    """Return how much each dimension grows from a small to a large cache."""
    one, two = (
        jax.tree.leaves(jax.eval_shape(lambda s=size: model.init_cache(*s)))
        for size in (small, large)
    )
    return [
        [n - m for m, n in zip(a.shape, b.shape, strict=True)]
        for a, b in zip(one, two, strict=True)
    ]
