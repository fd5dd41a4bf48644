"""Attention of one query a row, over a cache that is read in place.

A token that is decoded needs the keys written so far of one layer. XLA reads
all keys of the cache, also those that are yet to be written, and where a
layer's keys do not fit a chip's fast memory it first copies them out of the
cache of all layers. This kernel takes the cache of all layers and the layer's
index, and fetches the blocks of keys from the first of some rows to the last,
with the online softmax of ``flash``.

Query heads that share keys are the rows of a product, padded to the tile of
their type. Blocks hold several rows and heads, since each step of a grid has a
cost of its own.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.flash_kernels import (
    EMPTY,
    Options,
    add_keys,
    dot,
)
from topd_jax.types import soft_cap

# Keys of a block at the least; more where a cache is of more blocks than
# these parts (half a block is read in vain), or where the block's keys would
# be of so few bytes: beside what it does, a step of a grid takes some tenths
# of a microsecond, in which v5p reads about a megabyte. And bytes at the most.
_KEYS = 128
_PARTS = 32
_FEW_BYTES = 1 << 19
_BYTES = 1 << 20


class Sizes(NamedTuple):
    """Sizes of a call; static."""

    rows: int  # of a block
    groups: int  # of a block: heads that have keys
    shared: int  # query heads of each, padded
    size: int  # of a head
    keys: int  # of a block
    length: int  # L


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
    """Attend from one query a row by the kernel.

    What is in keys behind ``last`` does not matter.

    Args:
      query: [B, 1, heads, head_dim]; ``heads`` is a multiple of kv_heads.
      keys: [N, B, kv_heads, L, head_dim].
      values: the same.
      index: i32[] which of the N layers.
      mask: :func:`as_numbers` of the keys of each row, of those
        from ``first`` to ``last``.
      first: i32[B] a key, before which the row has none.
      last: i32[] a key, behind which no row has any.
      options: see :class:`~topd_jax.models.attention.flash_kernels.Options`.
      usual: keys, of L, that a call has to read on average; with half a
        block more they are what the kernel tells a plan that it costs.

    Returns:
      [B, 1, heads, head_dim] in the query's dtype, zero where a row has no
      keys.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, _, heads, _ = query.shape
    groups, sizes = keys.shape[2], sizes_of(query, keys)
    grouped = query.reshape(rows, groups, heads // groups, sizes.size)
    more = sizes.shared - heads // groups
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, more), (0, 0)))
    starts = jnp.min(first.reshape(-1, sizes.rows), axis=1)
    table = jnp.concatenate([jnp.stack([index, last]), starts])
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
        table.astype(jnp.int32),
        grouped,
        keys,
        values,
        mask,
    )
    return out[:, :, : heads // groups].reshape(query.shape)


def as_numbers(mask: jax.Array) -> jax.Array:
    """Convert bool[B, L] to i32[B, 1, L], as the kernel takes it."""
    return mask.astype(jnp.int32)[:, None]


def sizes_of(query: jax.Array, keys: jax.Array) -> Sizes:
    """Choose blocks for query [B, 1, heads, D], keys [N, B, kv_heads, L, D]."""
    rows, _, heads, size = query.shape
    groups, length = keys.shape[2:4]
    tile = 8 * 4 // query.dtype.itemsize
    shared = tile * -(-(heads // groups) // tile)
    # Two blocks of rows at the least, for a chip of two cores.
    half, each = max(rows // 2, 1), size * keys.dtype.itemsize
    block = _KEYS
    while (
        2 * block * _PARTS <= length
        or 2 * block * half * groups * each <= _FEW_BYTES
    ):
        block *= 2
    block = min(block, length)
    fit = max(_BYTES // (block * each), 1)
    together = _divisor(groups, fit)
    several = _divisor(rows, min(fit // together, half))
    return Sizes(several, together, shared, size, block, length)


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor that is not above ``most``."""
    return max(d for d in range(1, max(most, 1) + 1) if number % d == 0)


def _grid(sizes: Sizes, rows: int, groups: int) -> Any:
    """Lay out the steps, the blocks of each, and the sums that they share.

    Behind the layer, the last key, and the first one of every block of rows,
    the arrays are queries, keys, values and mask; rows and heads may go to a
    core each, all blocks of keys follow one another.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def of_query(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return row, group, 0, 0

    def of_keys(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return table[0], row, group, _block(sizes, table, row, step)[0], 0

    def of_mask(row: Any, group: Any, step: Any, table: Any) -> tuple:
        return row, 0, _block(sizes, table, row, step)[0]

    block = (sizes.rows, sizes.groups, sizes.shared, sizes.size)
    wide = (None, sizes.rows, sizes.groups, sizes.keys, sizes.size)
    query, key = pl.BlockSpec(block, of_query), pl.BlockSpec(wide, of_keys)
    mask = pl.BlockSpec((sizes.rows, 1, sizes.keys), of_mask)
    sums = (sizes.rows * sizes.groups, sizes.shared)
    steps = -(-sizes.length // sizes.keys)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows // sizes.rows, groups // sizes.groups, steps),
        in_specs=[query, key, key, mask],
        out_specs=query,
        scratch_shapes=[
            pltpu.VMEM((*sums, size), jnp.float32)
            for size in (sizes.size, 1, 1)
        ],
    )


def _block(sizes: Sizes, table: Any, row: Any, step: Any) -> tuple:
    """Return the block of keys of a step, and whether there is one.

    Behind the last one it stays the same, which fetches nothing.
    """
    at = table[2 + row] // sizes.keys + step
    end = table[1] // sizes.keys
    return jnp.minimum(at, end), at <= end


def _estimate(
    sizes: Sizes, query: jax.Array, keys: jax.Array, usual: int
) -> Any:
    """Estimate a call's cost, where ``usual`` keys are to be read."""
    from jax.experimental import pallas as pl

    rows, _, heads, size = query.shape
    count = min(usual + sizes.keys // 2, sizes.length)
    scores = rows * heads * count
    read = 2 * rows * count * keys.shape[2] * size * keys.dtype.itemsize
    read += rows * count * 4 * keys.shape[2] // sizes.groups
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
    """Run a step of the grid: begin, add a needed block, or finish."""
    from jax.experimental import pallas as pl

    step = pl.program_id(2)
    at, needed = _block(sizes, table, pl.program_id(0), step)
    left = table[1] - at * sizes.keys  # the last one, in its block

    @pl.when(step == 0)
    def _() -> None:
        for total, empty in zip(sums, EMPTY, strict=True):
            total[...] = jnp.full_like(total, empty)

    add = functools.partial(
        _add, sizes, options, query, key, value, mask, sums, left
    )
    pl.when(needed & (left >= sizes.keys - 1))(add)
    # What is behind the last key may be anything, times zero.
    pl.when(needed & (left < sizes.keys - 1))(functools.partial(add, cut=True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        total, _, weight = (x[...] for x in sums)
        result = total / jnp.where(weight > 0, weight, 1.0)
        out[...] = result.reshape(out.shape).astype(out.dtype)


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
    """Add a block of keys to the sums, [rows * groups, shared, ...]."""
    count = sizes.rows * sizes.groups
    query = query[...].reshape(count, sizes.shared, sizes.size)
    key, value = (
        x[...].reshape(count, sizes.keys, sizes.size) for x in (key, value)
    )
    scores = dot(query, key, (2, 2), (0,)) * options.scale
    scores = soft_cap(scores, options.cap)
    wide = (sizes.rows, sizes.groups, sizes.shared, sizes.keys)
    allowed = (
        jnp.broadcast_to(mask[...][:, None], wide).reshape(scores.shape) != 0
    )
    if cut:
        at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        allowed &= at <= left
        at = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
        plain = jnp.where(at <= left, value.astype(jnp.float32), 0.0)
        value = plain.astype(value.dtype)

    def product(share: jax.Array) -> jax.Array:
        return dot(share.astype(value.dtype), value, (2, 1), (0,))

    add_keys(sums, scores, allowed, product, axis=2)
