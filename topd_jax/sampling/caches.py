"""Change the caches of any model: rows, columns, and their dimensions.

Which dimensions of an array are rows and columns is told from how a model's
caches grow.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A shorter cache than this is not worth a loop of its own.
_SHORTEST = 64


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

    def one(x: jax.Array, per_row: list[int]) -> jax.Array:
        if not any(per_row):
            return x
        dim = per_row.index(max(per_row))
        size = per_row[dim]  # rows and heads may be one dimension
        lead, rest = x.shape[:dim], x.shape[dim + 1 :]
        x = jnp.repeat(x.reshape(*lead, -1, size, *rest), times, axis=dim)
        return x.reshape(*lead, -1, *rest)

    return change_leaves(one, growth(model.init_cache, (2, 1)), cache)


def add_columns(model: Any, cache: Any, extra: int) -> Any:
    """Add empty columns to a cache.

    Args:
      model: whose ``init_cache`` tells which dimension the columns are.
      cache: of that model.
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

    return change_leaves(one, growth(model.init_cache, (1, 2)), cache)


def stretches(length: int) -> list[int]:
    """Return where the cache grows: T, and its half, quarter, eighth.

    A step costs as many columns as the cache has, not as many as are written:
    rows that end early never pay for the limit. Each stretch is a loop to
    compile, so there are few, none below 64 columns.
    """
    ends = [-(-length // part) for part in (8, 4, 2)]
    return [end for end in ends if end >= _SHORTEST] + [length]


def growth(
    make: Callable[[int, int], Any], large: tuple[int, int]
) -> list[list[int]]:
    """Tell the dimensions of caches from how they grow.

    Args:
      make: (rows, columns) -> cache.
      large: rows and columns of a cache that is larger than (1, 1).

    Returns:
      Of every leaf, how much each of its dimensions grows.
    """
    one, two = (
        jax.tree.leaves(jax.eval_shape(lambda s=size: make(*s)))
        for size in ((1, 1), large)
    )
    return [
        [n - m for m, n in zip(a.shape, b.shape, strict=True)]
        for a, b in zip(one, two, strict=True)
    ]


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
