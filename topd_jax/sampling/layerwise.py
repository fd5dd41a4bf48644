"""Prepare a model and its cache for a loop over tokens.

A scan over stacked layers slices every weight at every token, and on CPU each
slice is a copy as large as the arithmetic that follows. Where the config
unrolls the whole stack, the layers are unstacked once, before the loop: every
weight and every layer's cache is an array of its own, laid out as the products
are fastest. Deep models (``unroll`` below ``layers``) stay stacked and compile
in constant time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.models.attention.cache import fold_heads
from topd_jax.models.attention.core import prepare_mask
from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder, layer_arrays
from topd_jax.models.layers import (
    embed,
    final_norm,
    layer,
    layer_options,
    merge_kernels,
)
from topd_jax.models.parameters import arrays_of
from topd_jax.models.rope import rope_table
from topd_jax.parallel.sharding import mesh_in_use

# A shorter cache than this is not worth a loop of its own.
_SHORTEST = 64


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
        return final_norm(hidden, self.final_norm, c), tuple(updated)


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
    if not _unrolls(model):
        return model, cache
    config, arrays = model.config, layer_arrays(model)
    # Without the barrier the slices would move into the loop that uses them,
    # and sines and cosines into every product of every layer.
    weights, caches, rope = jax.lax.optimization_barrier(
        (
            tuple(_weights(config, arrays, i) for i in range(config.layers)),
            unstack_cache(model, cache),
            rope_table(jnp.arange(length)[None], config),
        )
    )
    embedding, norm = model.embedding[...], model.final_norm[...]
    return Layerwise(weights, embedding, norm, rope, config), caches


def _weights(
    config: DecoderConfig, arrays: dict[str, Any], index: int
) -> dict[str, jax.Array]:
    own = arrays_of(config, arrays, index)
    return own if mesh_in_use() else merge_kernels(own, config)


def unstack_cache(model: Any, cache: Any) -> Any:
    """Return a cache as the model of :func:`unstack` takes it.

    Args:
      model: any model.
      cache: of that model.
    """
    if not _unrolls(model):
        return cache
    c = model.config
    recurrent = c.recurrent or (False,) * c.layers
    rows = zip(recurrent, layer_options(c)["index"].tolist(), strict=True)
    return tuple(_cache_of(cache, *row) for row in rows)


def _unrolls(model: Any) -> bool:
    return (
        isinstance(model, Decoder)
        and model.config.unroll >= model.config.layers
    )


def _cache_of(cache: Any, recurrent: bool, index: int) -> Any:
    """Return what one layer keeps, the only one of its cache."""
    if recurrent:
        states, inputs = cache.states[index], cache.inputs[index]
        return cache.replace(
            keys=None, values=None, states=states, inputs=inputs
        )
    keys, values = cache.keys[index], cache.values[index]
    if mesh_in_use() is None:
        keys, values = fold_heads(keys, values)
    return cache.replace(keys=keys, values=values, states=None, inputs=None)


def repeat_rows(model: Any, cache: Any, times: int) -> Any:
    """Repeat each row of a cache ``times`` times, consecutively.

    Args:
      model: whose ``init_cache`` tells which dimension the rows are.
      cache: as :func:`unstack_cache` returns it.
      times: copies of each row.

    Returns:
      The cache of ``times`` as many rows.
    """
    if times == 1:
        return cache

    def one(x: jax.Array, per_row: list[int]) -> jax.Array:
        if not any(per_row):
            return x
        dim = per_row.index(max(per_row))
        size = per_row[dim]  # rows and heads may be one dimension
        lead, rest = x.shape[:dim], x.shape[dim + 1 :]
        x = jnp.repeat(x.reshape(*lead, -1, size, *rest), times, axis=dim)
        return x.reshape(*lead, -1, *rest)

    return change_leaves(one, cache_growth(model, (2, 1)), cache)


def add_columns(model: Any, cache: Any, extra: int) -> Any:
    """Add empty columns to a cache.

    Args:
      model: whose ``init_cache`` tells which dimension the columns are.
      cache: as :func:`unstack_cache` returns it.
      extra: columns to add behind the others.

    Returns:
      The same with ``extra`` empty columns.
    """
    if extra == 0:
        return cache

    def one(x: jax.Array, own: list[int]) -> jax.Array:
        if not any(own):
            return x
        return jnp.pad(x, [(0, extra * more) for more in own])

    return change_leaves(one, cache_growth(model, (1, 2)), cache)


def stretches(length: int) -> list[int]:
    """Return where the cache grows: T, and its half, quarter, eighth.

    A step costs as many columns as the cache has, not as many as are written:
    rows that end early never pay for the limit. Each stretch is a loop to
    compile, so there are few, none below 64 columns.
    """
    ends = [-(-length // part) for part in (8, 4, 2)]
    return [end for end in ends if end >= _SHORTEST] + [length]


def growth(
    make: Callable[[int, int], Any],
    small: tuple[int, int],
    large: tuple[int, int],
) -> list[list[int]]:
    """Tell the dimensions of caches from how they grow.

    Args:
      make: (rows, columns) -> cache.
      small: rows and columns of one.
      large: of another.

    Returns:
      Of every leaf, how much each of its dimensions grows.
    """
    one, two = (
        jax.tree.leaves(jax.eval_shape(lambda s=size: make(*s)))
        for size in (small, large)
    )
    return [
        [n - m for m, n in zip(a.shape, b.shape, strict=True)]
        for a, b in zip(one, two, strict=True)
    ]


def cache_growth(model: Any, large: tuple[int, int]) -> list[list[int]]:
    """Tell how the cache of a loop over tokens grows from (1, 1).

    Args:
      model: that keeps it.
      large: rows and columns of the other.

    Returns:
      As :func:`growth`.
    """

    def empty(rows: int, columns: int) -> Any:
        return unstack_cache(model, model.init_cache(rows, columns))

    return growth(empty, (1, 1), large)


def change_leaves(
    change: Callable[..., jax.Array], grows: list[list[int]], *caches: Any
) -> Any:
    """Change every array of caches.

    Args:
      change: (array, how its dimensions grow, the arrays of the other caches)
        -> array.
      grows: of :func:`growth`.
      *caches: of one model.

    Returns:
      The changed cache.
    """
    leaves = zip(*map(jax.tree.leaves, caches), strict=True)
    changed = [
        change(x, own, *rest)
        for (x, *rest), own in zip(leaves, grows, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(caches[0]), changed)
