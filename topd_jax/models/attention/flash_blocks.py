"""Which blocks of queries and keys need each other, for ``flash``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Rows of a block of queries, all heads of a group, and scores of a pair of
# blocks: 1 MB in float32, of which a few exist at once in 16 MB.
_ROWS = 512
_SCORES = 1 << 18


class KernelMask(NamedTuple):
    """The arrays of an interval mask, and positions where layers slide.

    Attributes:
      exists: bool[B, L].
      prefix: i32[B, S].
      first: i32[B, S].
      last: i32[B, S].
      query_positions: i32[B, S]; None where no layer slides.
      key_positions: i32[B, L]; None with ``query_positions``.
      window: i32[] a query attends to keys less than so far behind it.
    """

    exists: jax.Array
    prefix: jax.Array
    first: jax.Array
    last: jax.Array
    query_positions: jax.Array | None
    key_positions: jax.Array | None
    window: jax.Array


class Sizes(NamedTuple):
    """Sizes of a call; static."""

    rows: int  # B
    groups: int  # heads that have keys
    shared: int  # R: query heads of each
    size: int  # of a head
    length: int  # S
    queries: int  # of a block
    keys: int  # of a block
    query_blocks: int
    key_blocks: int

    @property
    def lanes(self) -> int:
        """Count the rows of a block of queries, all heads of a group."""
        return self.queries * self.shared


def sizes_of(query: jax.Array, key: jax.Array) -> Sizes:
    """Choose blocks for query [B, S, heads, D] and key [B, L, kv_heads, D]."""
    rows, length, heads, size = query.shape
    keys, groups = key.shape[1:3]
    shared = heads // groups
    wide = 128 * max(_ROWS // shared // 128, 1)
    queries = min(wide, 128 * -(-length // 128))
    most = max(_SCORES // (queries * shared) // 128 * 128, 128)
    block = min(most, 128 * -(-keys // 128))
    return Sizes(
        rows, groups, shared, size, length, queries, block,
        -(-length // queries), -(-keys // block),
    )  # fmt: skip


class Tables(NamedTuple):
    """Which blocks need each other, for all rows; i32."""

    prefix: jax.Array  # [B, query blocks] key blocks, from the first
    begin: jax.Array  # the same: first key block of the stretch
    end: jax.Array  # the same: the last one; below begin where there is none
    low: jax.Array  # [B, key blocks] first query block that needs it
    high: jax.Array  # the same: the last one; below low where there is none
    window: jax.Array  # [1]


def arranged(
    sizes: Sizes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: KernelMask,
) -> tuple[dict[str, jax.Array], Tables]:
    """Return the kernels' arrays by name, in whole blocks, and the tables."""
    length = sizes.query_blocks * sizes.queries
    keys = sizes.key_blocks * sizes.keys

    def of_queries(x: jax.Array, empty: int) -> jax.Array:
        more = ((0, 0), (0, length - x.shape[1]))
        return jnp.pad(x.astype(jnp.int32), more, constant_values=empty)

    def of_keys(x: jax.Array) -> jax.Array:
        more = ((0, 0), (0, keys - x.shape[1]))
        return jnp.pad(x.astype(jnp.int32), more)[..., None]

    prefix, last = of_queries(mask.prefix, 0), of_queries(mask.last, -1)
    intervals = {"prefix": prefix, "first": of_queries(mask.first, 0)}
    intervals["last"] = last
    tables = _tables(sizes, **intervals, window=mask.window)
    if mask.query_positions is not None:
        intervals["query_position"] = of_queries(mask.query_positions, 0)
    arrays = {"query": grouped(sizes, query)}
    for name, x in (("key", key), ("value", value)):
        more = ((0, 0), (0, keys - x.shape[1]), (0, 0), (0, 0))
        arrays[name] = jnp.swapaxes(jnp.pad(x, more), 1, 2)
    arrays["exists"] = of_keys(mask.exists)
    if mask.key_positions is not None:
        arrays["key_position"] = of_keys(mask.key_positions)
    for name, x in intervals.items():
        arrays[name] = jnp.repeat(x, sizes.shared, axis=1)[:, None]
    return arrays, tables


def _tables(
    sizes: Sizes,
    prefix: jax.Array,
    first: jax.Array,
    last: jax.Array,
    window: jax.Array,
) -> Tables:
    # 17 tiles of 8 blocks is a sum that the compiler of v5p cannot split over
    # its two cores: an even number.
    count = 16 * -(-sizes.query_blocks // 16)
    more = ((0, 0), (0, (count - sizes.query_blocks) * sizes.queries))
    prefix, first, last = (
        jnp.pad(x, more, constant_values=empty).reshape(
            sizes.rows, count, sizes.queries
        )
        for x, empty in ((prefix, 0), (first, 0), (last, -1))
    )
    any_key = first <= last
    far = sizes.keys * sizes.key_blocks
    whole = -(-prefix.max(-1) // sizes.keys)
    begin = jnp.where(any_key, first, far).min(-1) // sizes.keys
    end = jnp.where(any_key, last, -1).max(-1) // sizes.keys
    key = jnp.arange(sizes.key_blocks)
    needs = key < whole[..., None]
    needs |= (begin[..., None] <= key) & (key <= end[..., None])
    order = jnp.arange(count)[:, None]
    low = jnp.where(needs, order, count).min(1)
    high = jnp.where(needs, order, -1).max(1)
    blocks = (x.astype(jnp.int32) for x in (whole, begin, end, low, high))
    return Tables(*blocks, window.astype(jnp.int32).reshape(1))


def grouped(sizes: Sizes, x: jax.Array) -> jax.Array:
    """Reshape [B, S, heads, D] to [B, groups, padded S * R, D]."""
    length = sizes.query_blocks * sizes.queries
    x = jnp.pad(x, ((0, 0), (0, length - sizes.length), (0, 0), (0, 0)))
    x = x.reshape(sizes.rows, length, sizes.groups, sizes.shared, sizes.size)
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(sizes.rows, sizes.groups, -1, sizes.size)


def ungrouped(sizes: Sizes, x: jax.Array) -> jax.Array:
    """Invert :func:`grouped`."""
    x = x.reshape(sizes.rows, sizes.groups, -1, sizes.shared, sizes.size)
    x = jnp.swapaxes(x, 1, 2)[:, : sizes.length]
    return x.reshape(sizes.rows, sizes.length, -1, sizes.size)


def key_block(tables: Tables, row: Any, query: Any, step: Any) -> tuple:
    """Return the key block of a step, and whether there is one.

    Behind the last one it stays the same, which fetches nothing.
    """
    whole, end = tables.prefix[row, query], tables.end[row, query]
    begin = jnp.maximum(tables.begin[row, query], whole)
    count = whole + jnp.maximum(end - begin + 1, 0)
    at = jnp.minimum(step, jnp.maximum(count - 1, 0))
    block = jnp.where(at < whole, at, begin + at - whole)
    return jnp.where(count > 0, block, 0), step < count


def query_block(tables: Tables, row: Any, key: Any, step: Any) -> tuple:
    """Return the query block of a step, and whether it needs the key block."""
    low, high = tables.low[row, key], tables.high[row, key]
    at = jnp.clip(low + step, 0, jnp.maximum(high, 0))
    stretch = tables.begin[row, at] <= key
    stretch &= key <= tables.end[row, at]
    needs = (key < tables.prefix[row, at]) | stretch
    return at, (low + step <= high) & needs
