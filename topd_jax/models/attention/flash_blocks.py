"""Which blocks of queries and keys need each other, for ``flash``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import IntervalMask

# Rows of a block of queries, all heads of a group, and scores of a pair of
# blocks: 1 MB in float32, of which a few exist at once in 16 MB.
_ROWS = 512
_SCORES = 1 << 18


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
    """Choose blocks for query [B, S, heads, D] and key [B, kv_heads, L, D]."""
    rows, length, heads, size = query.shape
    groups, keys = key.shape[1:3]
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
    """Which blocks need each other, for all rows; i32.

    Blocks of queries need the key blocks ``begin <= k < prefix``, and behind
    those ``first <= k < last``.
    """

    begin: jax.Array  # [B, query blocks]
    prefix: jax.Array
    first: jax.Array
    last: jax.Array
    low: jax.Array  # [B, key blocks] first query block that needs it
    high: jax.Array  # the same: the last one; below low where there is none


def arranged(
    sizes: Sizes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: IntervalMask,
) -> tuple[dict[str, jax.Array], Tables]:
    """Return the kernels' arrays by name, in whole blocks, and the tables."""
    length = sizes.query_blocks * sizes.queries
    keys = sizes.key_blocks * sizes.keys

    def of_keys(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, keys - x.shape[2]), (0, 0)))

    def of_queries(x: jax.Array, empty: int = 0) -> jax.Array:
        more = ((0, 0), (0, length - x.shape[1]))
        return jnp.pad(x.astype(jnp.int32), more, constant_values=empty)

    ends = {
        "begin": of_queries(mask.begin),
        "prefix": of_queries(mask.prefix),
        "first": of_queries(mask.first),
        "last": of_queries(mask.last, -1),
    }
    arrays = {
        "query": grouped(sizes, query),
        "key": of_keys(key),
        "value": of_keys(value),
        "exists": of_keys(mask.exists[:, None, :, None].astype(jnp.int32))[
            :, 0
        ],
    }
    for name, x in ends.items():
        arrays[name] = jnp.repeat(x, sizes.shared, axis=1)[:, None]
    return arrays, _tables(sizes, **ends)


def _tables(
    sizes: Sizes,
    begin: jax.Array,
    prefix: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> Tables:
    # 17 tiles of 8 blocks is a sum that the compiler of v5p cannot split over
    # its two cores: an even number.
    count = 16 * -(-sizes.query_blocks // 16)
    more = ((0, 0), (0, (count - sizes.query_blocks) * sizes.queries))

    def blocks(begin: jax.Array, end: jax.Array) -> tuple:
        """Return the key blocks of all queries of a block; 0, 0 for none."""
        begin, end = (
            jnp.pad(x, more).reshape(sizes.rows, count, sizes.queries)
            for x in (begin, end)
        )
        end = jnp.where(begin < end, end, 0)
        far = jnp.max(end, axis=-1)
        near = jnp.where(end > 0, begin, far[..., None]).min(-1)
        return near // sizes.keys, -(-far // sizes.keys)

    begin, prefix = blocks(begin, prefix)
    first, last = blocks(first, last + 1)
    # The last tokens of a rollout may reach back, in a window, behind what a
    # branch that shares their block reads of its prefix.
    begin = jnp.where(first < last, jnp.minimum(begin, first), begin)
    first, last = (jnp.maximum(x, prefix) for x in (first, last))
    key, order = jnp.arange(sizes.key_blocks), jnp.arange(count)[:, None]
    needs = _inside(*(x[..., None] for x in (begin, prefix, first, last)), key)
    low = jnp.where(needs, order, count).min(1)
    high = jnp.where(needs, order, -1).max(1)
    ends = (begin, prefix, first, last, low, high)
    return Tables(*(x.astype(jnp.int32) for x in ends))


def _inside(begin: Any, prefix: Any, first: Any, last: Any, key: Any) -> Any:
    needs = (begin <= key) & (key < prefix)
    return needs | (first <= key) & (key < last)


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


def needed(tables: Tables, row: Any, query: Any, key: Any) -> Any:
    """Tell whether a block of queries needs a block of keys."""
    return _inside(*(x[row, query] for x in tables[:4]), key)


def nearest_key(tables: Tables, row: Any, query: Any, key: Any) -> Any:
    """Return ``key`` if ``query`` needs it, else one near that it needs.

    What stays the same from step to step is not fetched again.
    """
    begin, prefix, first, last = (x[row, query] for x in tables[:4])
    behind = jnp.clip(key, first, last - 1)
    near = jnp.where(key < prefix, jnp.maximum(key, begin), behind)
    return jnp.maximum(near, 0)


def nearest_query(tables: Tables, row: Any, query: Any, key: Any) -> Any:
    """Return ``query`` if it needs ``key``, else one that is near."""
    near = jnp.clip(query, tables.low[row, key], tables.high[row, key])
    return jnp.maximum(near, 0)
