"""Attention of one query a row, over a cache that is read where it is. Ours.

A token that is decoded asks for the columns written so far of one layer. Read
by XLA, all columns of the cache are, also those that are yet to be written,
and where a layer's do not fit a chip's fast memory they are first copied out
of the cache of all layers. This kernel takes the cache of all
layers and the layer's index, and fetches the blocks of columns from the first
that a row sees to the last; softmax goes along as in ``flash``.

Query heads that share keys are the rows of a product, padded to the tile of
their type. Blocks are of several rows and heads, since a step of a grid has a
price of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.flash_kernels import UNSEEN, Options, dot
from topd_jax.types import soft_cap

# Columns of a block at the least; more where a cache is of more blocks than
# these parts (half a block is read in vain), or where the block's keys would
# be of so few bytes: beside what it does, a step of a grid takes some tenths
# of a microsecond, in which v5p reads about a megabyte. And bytes at the most.
_COLUMNS = 128
_PARTS = 32
_FEW_BYTES = 1 << 19
_BYTES = 1 << 20


class Sizes(NamedTuple):
    """Sizes of a call; static."""

    rows: int  # of a block
    groups: int  # of a block: heads that have keys
    shared: int  # query heads of each, padded
    size: int  # of a head
    columns: int  # of a block
    length: int  # L


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: jax.Array,
    mask: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    options: Options,
    usual: int,
    plain: Callable[..., jax.Array],
) -> jax.Array:
    """Attention by the kernel on TPU, plainly elsewhere; no gradient.

    Args:
      query: [B, 1, heads, head_dim].
      keys: [N, B, L, kv_heads, head_dim].
      values: the same.
      index: i32[] which of the N layers.
      mask: :func:`as_numbers` of the columns that each row sees, of those
        from ``first`` to ``last``.
      first: i32[B] a column, before which the row sees none.
      last: i32[] a column, behind which no row sees any.
      options: of the kernel.
      usual: see :func:`read`.
      plain: (query, key, value, bool[B, L]) -> the same, of one layer's
        columns.

    Returns:
      [B, 1, heads, head_dim].
    """

    def elsewhere(*arrays: jax.Array) -> jax.Array:
        query, keys, values, index, mask, _, last = arrays
        seen = (mask[:, 0] != 0) & (jnp.arange(mask.shape[2]) <= last)
        return plain(query, keys[index], values[index], seen)

    return jax.lax.platform_dependent(
        query, keys, values, index, mask, first, last,
        tpu=functools.partial(read, options=options, usual=usual),
        default=elsewhere,
    )  # fmt: skip


def read(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: jax.Array,
    mask: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    options: Options,
    usual: int,
) -> jax.Array:
    """Attention of one query a row by the kernel.

    What is in columns behind ``last`` does not matter.

    Args:
      query: [B, 1, heads, head_dim]; ``heads`` is a multiple of kv_heads.
      keys: [N, B, L, kv_heads, head_dim].
      values: the same.
      index: i32[] which of the N layers.
      mask: :func:`as_numbers` of the columns that each row sees, of those
        from ``first`` to ``last``.
      first: i32[B] a column, before which the row sees none.
      last: i32[] a column, behind which no row sees any.
      options: see :class:`~topd_jax.models.attention.flash_kernels.Options`.
      usual: columns, of L, that a call has to read on average; with half a
        block more they are what the kernel tells a plan that it costs.

    Returns:
      [B, 1, heads, head_dim] in the query's dtype, zero where a row sees
      nothing.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, _, heads, _ = query.shape
    groups, sizes = keys.shape[3], sizes_of(query, keys)
    grouped = query.reshape(rows, groups, heads // groups, sizes.size)
    more = sizes.shared - heads // groups
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, more), (0, 0)))
    out = pl.pallas_call(
        functools.partial(_visit, sizes, options),
        grid_spec=_grid(sizes, rows, groups),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_estimate(sizes, query, keys, usual),
        interpret=options.interpret,
    )(
        jnp.stack([index, jnp.min(first), last]).astype(jnp.int32),
        grouped,
        # As they lie in memory: the compiler makes no copy of it.
        jnp.swapaxes(keys, 2, 3),
        jnp.swapaxes(values, 2, 3),
        mask,
    )
    return out[:, :, : heads // groups].reshape(query.shape)


def as_numbers(mask: jax.Array) -> jax.Array:
    """bool[B, L] -> i32[B, 1, L], as the kernel takes it."""
    return mask.astype(jnp.int32)[:, None]


def sizes_of(query: jax.Array, keys: jax.Array) -> Sizes:
    """Blocks for query [B, 1, heads, D] and keys [N, B, L, kv_heads, D]."""
    rows, _, heads, size = query.shape
    length, groups = keys.shape[2:4]
    tile = 8 * 4 // query.dtype.itemsize
    shared = tile * -(-(heads // groups) // tile)
    # Two blocks of rows at the least, for a chip of two cores.
    half, each = max(rows // 2, 1), size * keys.dtype.itemsize
    columns = _COLUMNS
    while (
        2 * columns * _PARTS <= length
        or 2 * columns * half * groups * each <= _FEW_BYTES
    ):
        columns *= 2
    columns = min(columns, length)
    fit = max(_BYTES // (columns * each), 1)
    together = _divisor(groups, fit)
    several = _divisor(rows, min(fit // together, half))
    return Sizes(several, together, shared, size, columns, length)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above ``most``."""
    return max(d for d in range(1, max(most, 1) + 1) if number % d == 0)


def _grid(sizes: Sizes, rows: int, groups: int) -> Any:
    """The steps, where the blocks of each are, and the sums that they share.

    Behind the layer, and the first and last column, the arrays are queries,
    keys, values and mask; rows and heads may go to a core each, all blocks of
    columns follow one another.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def own(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return row, group, 0, 0

    def of_column(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return table[0], row, group, _block(sizes, table, step)[0], 0

    def of_mask(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return row, 0, _block(sizes, table, step)[0]

    block = (sizes.rows, sizes.groups, sizes.shared, sizes.size)
    wide = (None, sizes.rows, sizes.groups, sizes.columns, sizes.size)
    query, column = pl.BlockSpec(block, own), pl.BlockSpec(wide, of_column)
    mask = pl.BlockSpec((sizes.rows, 1, sizes.columns), of_mask)
    sums = (sizes.rows * sizes.groups, sizes.shared)
    steps = -(-sizes.length // sizes.columns)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows // sizes.rows, groups // sizes.groups, steps),
        in_specs=[query, column, column, mask],
        out_specs=query,
        scratch_shapes=[
            pltpu.VMEM((*sums, size), jnp.float32)
            for size in (sizes.size, 1, 1)
        ],
    )


def _block(sizes: Sizes, table: Any, step: Any) -> tuple:
    """The block of columns of a step, and whether there is one.

    Behind the last one it stays the same, which fetches nothing.
    """
    at = table[1] // sizes.columns + step
    end = table[2] // sizes.columns
    return jnp.minimum(at, end), at <= end


def _estimate(
    sizes: Sizes, query: jax.Array, keys: jax.Array, usual: int
) -> Any:
    """What a call costs, where ``usual`` columns are to be read."""
    from jax.experimental import pallas as pl

    rows, _, heads, size = query.shape
    columns = min(usual + sizes.columns // 2, sizes.length)
    scores = rows * heads * columns
    read = 2 * rows * columns * keys.shape[3] * size * keys.dtype.itemsize
    read += rows * columns * 4 * keys.shape[3] // sizes.groups
    moved = 2 * math.prod(query.shape) * query.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * scores * size,
        transcendentals=scores,
        bytes_accessed=read + moved,
    )


def _visit(
    sizes: Sizes,
    options: Options,
    table: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    out: Any,
    *sums: Any,
) -> None:
    """A step of the grid: begins, adds a block that is needed, or finishes."""
    from jax.experimental import pallas as pl

    step = pl.program_id(2)
    at, needed = _block(sizes, table, step)
    left = table[2] - at * sizes.columns  # the last one, in its block

    @pl.when(step == 0)
    def _() -> None:
        for total, empty in zip(sums, (0.0, UNSEEN, 0.0), strict=True):
            total[...] = jnp.full_like(total, empty)

    add = functools.partial(
        _add, sizes, options, query, key, value, mask, sums, left
    )
    pl.when(needed & (left >= sizes.columns - 1))(add)
    # What is behind the last column seen may be anything, times zero.
    pl.when(needed & (left < sizes.columns - 1))(
        functools.partial(add, cut=True)
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        total, _, weight = (x[...] for x in sums)
        found = total / jnp.where(weight > 0, weight, 1.0)
        out[...] = found.reshape(out.shape).astype(out.dtype)


def _add(
    sizes: Sizes,
    options: Options,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    sums: tuple,
    left: Any,
    cut: bool = False,
) -> None:
    """Adds a block of columns to the sums, [rows * groups, shared, ...]."""
    count = sizes.rows * sizes.groups
    total, most, weight = sums
    query = query[...].reshape(count, sizes.shared, sizes.size)
    key, value = (
        x[...].reshape(count, sizes.columns, sizes.size) for x in (key, value)
    )
    scores = dot(query, key, (2, 2), (0,)) * options.scale
    scores = soft_cap(scores, options.cap)
    wide = (sizes.rows, sizes.groups, sizes.shared, sizes.columns)
    seen = jnp.broadcast_to(mask[...][:, None], wide).reshape(scores.shape) != 0
    if cut:
        at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        seen &= at <= left
        at = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
        plain = jnp.where(at <= left, value.astype(jnp.float32), 0.0)
        value = plain.astype(value.dtype)
    scores = jnp.where(seen, scores, UNSEEN)
    old = most[...]
    new = jnp.maximum(old, jnp.max(scores, axis=2, keepdims=True))
    share = jnp.where(seen, jnp.exp(scores - new), 0.0)
    keep = jnp.exp(old - new)
    most[...] = new
    weight[...] = weight[...] * keep + jnp.sum(share, 2, keepdims=True)
    more = dot(share.astype(value.dtype), value, (2, 1), (0,))
    total[...] = total[...] * keep + more
