"""Attention behind one function, the cache, and what each layer sees."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from topd_jax.models.attention import branches, flash, flash_decode
from topd_jax.models.attention.masks import Branching, Mask, Spans, Written
from topd_jax.models.config import DecoderConfig
from topd_jax.parallel.collectives import over_cached_heads, over_heads
from topd_jax.types import soft_cap

# Scores of one head and row that may exist at once (16 MB in float32), and of
# a block of queries where there are more.
_LONG_SCORES = 1 << 22
_BLOCK_SCORES = 1 << 21

# Queries from which on the kernels are worth their blocks.
_KERNEL_QUERIES = 128

# Farther than any two columns: a layer that does not slide.
_EVERYTHING = np.iinfo(np.int32).max


@struct.dataclass
class Cache:
    """Keys and values of the columns that a model has read.

    Attributes:
      keys: [N, B, L, kv_heads, head_dim] in compute dtype.
      values: the same shape.
      length: i32[] columns written so far.
      positions: i32[1, B, L] rotary position of each column; None where no
        layer slides, since nothing else asks for them.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    positions: jax.Array | None = None


class Sight(NamedTuple):
    """What the tokens of a call may attend to, the same for all layers.

    Attributes:
      mask: bool[B, 1, S, L] columns each token attends to; as it was given
        where it is never made whole.
      rows: i32[B, S] positions of the tokens.
      columns: i32[B, L] positions of the columns; None where no layer slides.
      exists: of what is written, as the kernel takes it: made once for all
        layers; None for other masks.
    """

    mask: Mask
    rows: jax.Array
    columns: jax.Array | None
    exists: jax.Array | None = None


def look(
    config: DecoderConfig,
    positions: jax.Array,
    mask: Mask,
    cache: Cache | None,
) -> tuple[Sight, Cache | None]:
    """Prepares what all layers see; notes the new columns' positions.

    Args:
      config: the decoder's shape.
      positions: i32[B, S] of the tokens that are read.
      mask: bool[B, S, L], spans, what is written, or what branches see.
      cache: that will hold them at its next S columns, or None.

    Returns:
      (sight, cache).
    """
    exists = None
    if isinstance(mask, Spans):
        columns = mask.exists.shape[1]
        if not (
            _is_long(positions.shape[1], columns)
            or _by_kernel(config, positions.shape[1])
        ):
            mask = mask.dense()[:, None]
    elif isinstance(mask, Written):
        if config.attention == "flash":
            exists = flash_decode.as_numbers(mask.exists)
        else:
            mask = mask.dense()[:, None]
    elif not isinstance(mask, Branching):
        mask = mask[:, None]
    if not any(config.sliding):
        return Sight(mask, positions, None, exists), cache
    if cache is None:
        return Sight(mask, positions, positions), None
    noted = jax.lax.dynamic_update_slice(
        cache.positions, positions[None], (0, 0, cache.length)
    )
    sight = Sight(mask, positions, noted[0], exists)
    return sight, cache.replace(positions=noted)


def reach(config: DecoderConfig) -> np.ndarray:
    """i32[N]: how far back each layer sees, its own column included."""
    sliding = np.asarray(config.sliding or (False,) * config.layers)
    return np.where(sliding, config.window or 0, _EVERYTHING).astype(np.int32)


def visible(sight: Sight, reach: jax.Array) -> jax.Array:
    """The mask of one layer.

    A column is in reach by its *position*: columns of a cache need not be in
    order (branches of one prefix stand behind the rollout they leave).

    Args:
      sight: of the call.
      reach: i32[] of the layer.

    Returns:
      bool[B, 1, S, L].
    """
    mask = sight.mask
    if isinstance(mask, Spans | Written):
        mask = mask.dense()[:, None]
    if sight.columns is None:
        return mask
    # Fused into whatever reads it: only the mask is as large as S x L.
    back = sight.rows[:, None, :, None] - sight.columns[:, None, None]
    return mask & (back < reach)


def _block(columns: int) -> int:
    """Queries that are read at once where there are many."""
    return max(_BLOCK_SCORES // columns // 128, 1) * 128


def _is_long(length: int, columns: int) -> bool:
    """Whether so many queries are read a block at a time."""
    return length > max(_block(columns), _LONG_SCORES // columns)


def _by_kernel(config: DecoderConfig, length: int) -> bool:
    return config.attention == "flash" and length >= _KERNEL_QUERIES


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight,
    reach: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attention of grouped heads: the only place that knows how.

    By the kernels of :mod:`topd_jax.models.attention.flash` where the config
    asks for
    them, the platform is a TPU and a mesh leaves a device its heads' keys.
    Otherwise long sequences are read a block of queries at a time, whose
    scores alone exist: at 8800 columns all scores of one row and 32 heads are
    9.9 GB.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim].
      value: the same.
      sight: of the call.
      reach: i32[] of the layer.
      config: for its ``query_scalar``, ``attention_softcap`` and
        ``attention``.

    Returns:
      [B, S, heads, head_dim].
    """
    spans = sight.mask
    if isinstance(spans, Branching):
        return _attend_branches(query, key, value, sight, reach, config)
    if isinstance(spans, Spans) and _by_kernel(config, query.shape[1]):
        slides = sight.columns is not None
        seen = flash.Seen(
            spans.exists, spans.prefix, spans.first, spans.last,
            sight.rows if slides else None, sight.columns, reach,
        )  # fmt: skip
        read = functools.partial(_by_platform, config)
        out = over_heads(read, query, key, value, seen)
        if out is not None:
            return out
    return _attend_long(query, key, value, sight, reach, config)


def _attend_branches(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight,
    reach: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attention of the tokens of branches, one of each."""
    options = flash.Options(_scale(config), config.attention_softcap)
    read = functools.partial(
        branches.attend, options=options, read=sight.mask.read
    )
    rows = None if sight.columns is None else sight.rows
    seen = branches.seen_of(sight.mask, rows, sight.columns, reach)
    if _by_kernel(config, query.shape[1]):
        by_kernel = functools.partial(read, kernel=True)
        out = over_heads(by_kernel, query, key, value, seen)
        if out is not None:
            return out
    return read(query, key, value, seen)


def attend_cached(
    query: jax.Array,
    cache: Cache,
    index: jax.Array,
    sight: Sight,
    reach: jax.Array,
    config: DecoderConfig,
) -> jax.Array | None:
    """Attention of one token a row, which reads the cache where it is.

    Args:
      query: [B, 1, heads, head_dim].
      cache: that holds the tokens' own columns already.
      index: i32[] of the layer in the cache.
      sight: of the call.
      reach: i32[] of the layer.
      config: as in :func:`attend`.

    Returns:
      [B, 1, heads, head_dim]; None where :func:`attend` is to read: without
      ``sight.exists``, and where heads and their keys would part.
    """
    written, mask = sight.mask, sight.exists
    if mask is None:
        return None

    def plain(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> jax.Array:
        return _attend(query, key, value, mask[:, None, None], config)

    read = functools.partial(
        flash_decode.attend,
        options=flash.Options(_scale(config), config.attention_softcap),
        usual=_usual(config, written.usual),
        plain=plain,
    )
    first = jnp.zeros(query.shape[0], jnp.int32)
    if sight.columns is not None:
        seen = visible(sight, reach)[:, 0, 0]
        mask, first = flash_decode.as_numbers(seen), jnp.argmax(seen, axis=1)
    return over_cached_heads(
        read, query, cache.keys, cache.values, jnp.asarray(index),
        mask, first, written.length - 1,
    )  # fmt: skip


def _usual(config: DecoderConfig, written: int) -> int:
    """Columns that a layer reads, on average of those that slide or not."""
    return int(np.minimum(reach(config), written).mean())


def _by_platform(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: flash.Seen,
) -> jax.Array:
    """Attention by the kernels on TPU, by blocks elsewhere."""

    def blocks(
        query: jax.Array, key: jax.Array, value: jax.Array, seen: flash.Seen
    ) -> jax.Array:
        spans = Spans(seen.exists, seen.prefix, seen.first, seen.last)
        rows = spans.last if seen.rows is None else seen.rows
        sight = Sight(spans, rows, seen.columns)
        return _attend_long(query, key, value, sight, seen.reach, config)

    options = flash.Options(_scale(config), config.attention_softcap)
    return flash.attend(query, key, value, seen, options, blocks)


def _attend_long(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight,
    reach: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attention, a block of queries at a time where there are many."""
    length, columns = query.shape[1], key.shape[1]
    if not _is_long(length, columns):
        return _attend(query, key, value, visible(sight, reach), config)
    # The cotangents of a loop's constants are summed in their own type.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def of_block(query: jax.Array, sight: Sight) -> jax.Array:
        # A mask that waits for the queries cannot be made, for all blocks at
        # once, ahead of the loop and kept for the backward pass.
        query, sight = jax.lax.optimization_barrier((query, sight))
        narrow = (x.astype(query.dtype) for x in wide)
        return _attend(query, *narrow, visible(sight, reach), config)

    return _in_blocks(of_block, query, sight, _block(columns))


def _in_blocks(
    of_block: Callable[[jax.Array, Sight], jax.Array],
    query: jax.Array,
    sight: Sight,
    block: int,
) -> jax.Array:
    """Attention of ``block`` queries at a time; computed again backward.

    A block takes queries from all over the sequence, so that each device of a
    mesh that spreads them has its share of every block.
    """
    length = query.shape[1]
    count = -(-length // block)

    def split(x: jax.Array, axis: int = 1) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * block - length)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], block, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    if isinstance(sight.mask, Spans):
        kept = ("prefix", "first", "last")
        seen = {name: split(getattr(sight.mask, name)) for name in kept}
    else:
        seen = split(sight.mask, 2)

    def read(_: None, chunk: tuple) -> tuple[None, jax.Array]:
        query, rows, seen = chunk
        mask = sight.mask.replace(**seen) if isinstance(seen, dict) else seen
        return None, of_block(query, Sight(mask, rows, sight.columns))

    _, out = jax.lax.scan(read, None, (split(query), split(sight.rows), seen))
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(out.shape[0], count * block, *out.shape[3:])
    return out[:, :length]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attention with all scores at once."""
    scale = _scale(config)
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale
        )
    # jax.nn's attention has no soft-cap.
    rows, length, heads, size = query.shape
    grouped = query.reshape(rows, length, key.shape[2], -1, size)
    scores = jnp.einsum(
        "bsngd,blnd->bngsl", grouped, key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * scale, config.attention_softcap)
    # Finite: a row that sees nothing must not be nan.
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bngsl,blnd->bsngd", weights, value)
    return out.reshape(rows, length, heads, size)


def _scale(config: DecoderConfig) -> float:
    return (config.query_scalar or config.head_dim) ** -0.5


def write_columns(
    cache: Cache, key: jax.Array, value: jax.Array, index: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's new columns; returns the cache and that layer.

    The whole cache is carried through the scan over layers and written in
    place; as a scanned input and output it would be copied at every token.
    """
    start = (index, 0, cache.length, 0, 0)
    keys = jax.lax.dynamic_update_slice(cache.keys, key[None], start)
    values = jax.lax.dynamic_update_slice(cache.values, value[None], start)
    cache = cache.replace(keys=keys, values=values)
    return cache, keys[index], values[index]
