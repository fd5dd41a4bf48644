"""Attention behind one function, the cache, and what each layer sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from topd_jax.head import soft_cap
from topd_jax.models.config import DecoderConfig

# Scores of one head and row that may exist at once (16 MB in float32), and of
# a block of queries where there are more.
_LONG_SCORES = 1 << 22
_BLOCK_SCORES = 1 << 21

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
      mask: bool[B, 1, S, L] columns each token attends to.
      rows: i32[B, S] positions of the tokens.
      columns: i32[B, L] positions of the columns; None where no layer slides.
    """

    mask: jax.Array
    rows: jax.Array
    columns: jax.Array | None


def look(
    config: DecoderConfig,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache | None,
) -> tuple[Sight, Cache | None]:
    """Prepares what all layers see; notes the new columns' positions.

    Args:
      config: the decoder's shape.
      positions: i32[B, S] of the tokens that are read.
      mask: bool[B, S, L].
      cache: that will hold them at its next S columns, or None.

    Returns:
      (sight, cache).
    """
    if not any(config.sliding):
        return Sight(mask[:, None], positions, None), cache
    if cache is None:
        return Sight(mask[:, None], positions, positions), None
    noted = jax.lax.dynamic_update_slice(
        cache.positions, positions[None], (0, 0, cache.length)
    )
    sight = Sight(mask[:, None], positions, noted[0])
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
    if sight.columns is None:
        return sight.mask
    # Fused into whatever reads it: only the mask is as large as S x L.
    back = sight.rows[:, None, :, None] - sight.columns[:, None, None]
    return sight.mask & (back < reach)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attention of grouped heads: the only place that knows how.

    Long sequences are read a block of queries at a time, whose scores alone
    exist: at 8800 columns all scores of one row and 32 heads are 9.9 GB.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim].
      value: the same.
      mask: bool[B, 1, S, L].
      config: for its ``query_scalar`` and ``attention_softcap``.

    Returns:
      [B, S, heads, head_dim].
    """
    length, columns = query.shape[1], key.shape[1]
    block = max(_BLOCK_SCORES // columns // 128, 1) * 128
    if length <= max(block, _LONG_SCORES // columns):
        return _attend(query, key, value, mask, config)
    return _attend_in_blocks(query, key, value, mask, config, block)


def _attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    config: DecoderConfig,
    block: int,
) -> jax.Array:
    """The same, ``block`` queries at a time; computed again backward."""
    length = query.shape[1]
    count = -(-length // block)
    pad = count * block - length

    def split(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, pad)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # The cotangents of a loop's constants are summed in their own type.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def of_block(query: jax.Array, mask: jax.Array) -> jax.Array:
        narrow = (x.astype(query.dtype) for x in wide)
        return _attend(query, *narrow, mask, config)

    _, out = jax.lax.scan(
        lambda _, x: (None, of_block(*x)),
        None,
        (split(query, 1), split(mask, 2)),
    )
    out = jnp.moveaxis(out, 0, 1)
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
    scale = (config.query_scalar or config.head_dim) ** -0.5
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
