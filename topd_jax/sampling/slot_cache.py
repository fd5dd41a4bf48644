"""Rows and columns of the cache of slots, whatever model keeps it.

Which dimensions of an array are rows and columns is told from how a model's
caches grow. Integer scalars count the tokens that are written.
"""

from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.models.attention.cache import update_slice
from topd_jax.parallel.collectives import over_rows
from topd_jax.sampling.caches import change_leaves, growth


def add_tokens(cache: Any, count: int | jax.Array) -> Any:
    """Count more tokens as written, or fewer.

    Args:
      cache: of any model.
      count: of each row, to be added.
    """

    def one(x: jax.Array) -> jax.Array:
        counts = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
        return x + jnp.asarray(count, x.dtype) if counts else x

    return jax.tree.map(one, cache)


def cut_columns(
    model: Any, cache: Any, start: int | jax.Array, size: int
) -> Any:
    """Return the cache of some columns alone.

    Args:
      model: that keeps it.
      cache: of that model.
      start: the first of the columns.
      size: how many.
    """

    def one(x: jax.Array, grows: list[int]) -> jax.Array:
        for dim in (d for d, more in enumerate(grows) if more):
            x = jax.lax.dynamic_slice_in_dim(x, start, size, dim)
        return x

    cut = change_leaves(one, growth(model.init_cache, (1, 2)), cache)
    return add_tokens(cut, -start)


def paste_columns(model: Any, cache: Any, part: Any) -> Any:
    """Put columns to the beginning of a cache; it counts as they do.

    Args:
      model: that keeps it.
      cache: of that model.
      part: of :func:`cut_columns`.
    """

    def one(x: jax.Array, grows: list[int], y: jax.Array) -> jax.Array:
        return update_slice(x, y, [0] * x.ndim) if any(grows) else y

    return change_leaves(one, growth(model.init_cache, (1, 2)), cache, part)


def put_rows(
    model: Any, held: Any, new: Any, slots: jax.Array, at: jax.Array
) -> Any:
    """Put rows into slots.

    Args:
      model: that keeps the cache.
      held: (cache, [S, D], f32[S, T, 2]) of all slots.
      new: the same of G rows, whose cache has fewer columns.
      slots: i32[G] slot of each row, counted on its device; -1 for none.
      at: i32[] column of the cache for the first of theirs.

    Returns:
      ``held`` with the rows in it.
    """
    of_rows, of_columns = _growth(model, (2, 1)), _growth(model, (1, 2))
    dims = [r.index(max(r)) if any(r) else None for r in of_rows]

    def put(
        i: jax.Array, held: list, new: list, slots: jax.Array, at: jax.Array
    ) -> list:
        out = list(held)
        for n, (x, y, dim) in enumerate(zip(held, new, dims, strict=True)):
            if dim is None:
                continue
            size = of_rows[n][dim]  # rows and heads may be one dimension
            row = jax.lax.dynamic_slice_in_dim(y, i * size, size, dim)
            place, inner, shape = [0] * x.ndim, [0] * x.ndim, list(x.shape)
            place[dim], shape[dim] = jnp.maximum(slots[i], 0) * size, size
            columns = [d for d, more in enumerate(of_columns[n]) if more]
            for d in columns[:1]:
                place[d], shape[d] = at, y.shape[d]
            for d in columns[1:]:  # of a mask: attends to no other column
                inner[d] = at
            row = update_slice(jnp.zeros(shape, x.dtype), row, inner)
            place = [jnp.asarray(start, jnp.int32) for start in place]
            old = jax.lax.dynamic_slice(x, place, shape)
            out[n] = update_slice(x, jnp.where(slots[i] < 0, old, row), place)
        return out

    def write(held: list, new: list, *places: jax.Array) -> list:
        return jax.lax.fori_loop(
            0, len(places[0]), lambda i, x: put(i, x, new, *places), held
        )

    leaves, structure = jax.tree.flatten(held)
    leaves = over_rows(
        write, len(held[1]), leaves, jax.tree.leaves(new), dims, slots, at
    )
    return jax.tree.unflatten(structure, leaves)


def _growth(model: Any, large: tuple[int, int]) -> list[list[int]]:
    """Tell the dimensions of (cache, hidden, noise); see :func:`growth`."""

    def held(rows: int, columns: int) -> Any:
        cache = model.init_cache(rows, columns)
        return cache, jnp.zeros((rows, 1)), jnp.zeros((rows, 1, 1))

    return growth(held, large)
