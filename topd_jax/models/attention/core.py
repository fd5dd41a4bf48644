"""Attention behind one function, and the mask of each layer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.attention import branches, cudnn, flash, flash_decode
from topd_jax.models.attention.cache import Cache, unfold_heads, update_slice
from topd_jax.models.attention.masks import (
    BranchMask,
    CachedMask,
    IntervalMask,
    Mask,
    RolloutMask,
)
from topd_jax.models.config import DecoderConfig
from topd_jax.models.recurrence import TokenOrder, token_order
from topd_jax.parallel.collectives import over_heads
from topd_jax.parallel.sharding import mesh_in_use
from topd_jax.types import soft_cap

# Scores of one head and row that may exist at once (16 MB in float32), and of
# a block of queries where there are more.
_LONG_SCORES = 1 << 22
_BLOCK_SCORES = 1 << 21

# Queries from which on the kernels are worth their blocks.
_KERNEL_QUERIES = 128

# Branches are read with their prefix, other branches masked, where they have so
# few keys, or half of those that were read: apart, the prefix is copied.
_FEW_BEHIND = 256

# Farther than any two keys: a layer that does not slide.
_EVERYTHING = np.iinfo(np.int32).max


class MaskSpec(NamedTuple):
    """Which keys the tokens of a call attend to, the same for all layers.

    Attributes:
      mask: bool[B, 1, S, L] keys each token attends to; as it was given
        where it is never made whole.
      query_positions: i32[B, S] positions of the tokens.
      key_positions: i32[B, L] positions of the keys; None where no layer
        slides.
      order: of the tokens, for layers that are recurrent; None without any.
    """

    mask: Mask
    query_positions: jax.Array
    key_positions: jax.Array | None
    order: TokenOrder | None = None


def prepare_mask(
    config: DecoderConfig,
    positions: jax.Array,
    mask: Mask,
    cache: Cache | None,
) -> tuple[MaskSpec, Cache | None]:
    """Prepare the mask of all layers; note the new keys' positions.

    Args:
      config: the decoder's shape.
      positions: i32[B, S] of the tokens that are read.
      mask: bool[B, S, L], or one of :mod:`topd_jax.models.attention.masks`.
      cache: that will hold them at its next S keys, or None.

    Returns:
      (spec, cache).
    """
    count, order = positions.shape[1], None
    if config.recurrent:
        order = token_order(mask, cache, count)
    if isinstance(mask, RolloutMask):
        mask = mask.intervals
    whole, kernel = False, _by_kernel(config, count)
    if isinstance(mask, IntervalMask):
        whole = not kernel and not _is_long(count, mask.exists.shape[1])
    elif isinstance(mask, CachedMask):
        whole = config.attention != "flash"
    elif isinstance(mask, BranchMask):
        behind = mask.exists.shape[1] - mask.read
        whole = not kernel and behind <= max(_FEW_BEHIND, mask.read // 2)
    else:
        mask = mask[:, None]
    if whole:
        mask = mask.dense()[:, None]
    if not any(config.sliding):
        return MaskSpec(mask, positions, None, order), cache
    if cache is None:
        return MaskSpec(mask, positions, positions, order), None
    noted = update_slice(cache.positions, positions[None], (0, 0, cache.length))
    spec = MaskSpec(mask, positions, noted[0], order)
    return spec, cache.replace(positions=noted)


def layer_windows(config: DecoderConfig) -> np.ndarray:
    """Return i32[N]: keys in each layer's window, its own included."""
    sliding = np.asarray(config.sliding or (False,) * config.layers)
    return np.where(sliding, config.window or 0, _EVERYTHING).astype(np.int32)


def layer_mask(spec: MaskSpec, window: jax.Array) -> jax.Array:
    """Return the mask of one layer.

    A key is inside the window by its *position*: keys of a cache need not
    be in order (branches of one prefix stand behind the rollout they leave).

    Args:
      spec: of the call, no intervals.
      window: i32[] of the layer.

    Returns:
      bool[B, 1, S, L].
    """
    mask = spec.mask
    if isinstance(mask, CachedMask):
        mask = mask.dense()[:, None]
    if spec.key_positions is None:
        return mask
    # Fused into whatever reads it: only the mask is as large as S x L.
    back = (
        spec.query_positions[:, None, :, None]
        - spec.key_positions[:, None, None]
    )
    return mask & (back < window)


def _block(keys: int) -> int:
    """Return how many queries are read at once where there are many."""
    return max(_BLOCK_SCORES // keys // 128, 1) * 128


def _is_long(length: int, keys: int) -> bool:
    """Tell whether so many queries are read a block at a time."""
    return length > max(_block(keys), _LONG_SCORES // keys)


def _by_kernel(config: DecoderConfig, length: int) -> bool:
    return config.attention == "flash" and length >= _KERNEL_QUERIES


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: MaskSpec,
    window: jax.Array,
    config: DecoderConfig,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attend with grouped heads: the single attention entry point.

    By the kernels of :mod:`topd_jax.models.attention.flash` on a TPU, and by
    :mod:`topd_jax.models.attention.cudnn` on a GPU, where the config asks for
    them and a mesh leaves a device its heads' keys. Otherwise long sequences
    are read a block of queries at a time, whose scores alone exist: at 8800
    keys all scores of one row and 32 heads are 9.9 GB.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, kv_heads, L, head_dim].
      value: the same.
      spec: of the call.
      window: i32[] of the layer.
      config: for its ``attention_scale``, ``attention_softcap`` and
        ``attention``.
      sinks: [heads] scores beside those of the keys, or None.

    Returns:
      [B, S, heads, head_dim].
    """
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
    mask, kernels = spec.mask, _by_kernel(config, query.shape[1])
    plain = functools.partial(_attend, sinks=sinks)
    blocks = functools.partial(_attend_long, config, read=plain)
    if isinstance(mask, BranchMask):
        mask = branches.keys_of(mask, *spec[1:3], window)
        blocks = functools.partial(
            branches.attend, options=_options(config), sinks=sinks
        )
        by_kernel = functools.partial(blocks, kernel=True)
    elif isinstance(mask, IntervalMask):
        mask = mask.within(window)
        fused = functools.partial(_attend_long, config, read=_attend_fused)
        by_kernel = functools.partial(
            flash.attend, options=_options(config), blocks=fused
        )
    else:
        mask, kernels = layer_mask(spec, window), False
    out = over_heads(by_kernel, query, key, value, mask) if kernels else None
    return blocks(query, key, value, mask) if out is None else out


def attend_cached(
    query: jax.Array,
    cache: Cache,
    index: jax.Array | None,
    spec: MaskSpec,
    window: jax.Array,
    config: DecoderConfig,
) -> jax.Array | None:
    """Attend from one token a row, in place on a TPU; no gradient.

    Args:
      query: [B, 1, heads, head_dim].
      cache: that holds the tokens' own keys already.
      index: i32[] of the layer in the cache; None of one of one layer.
      spec: of the call.
      window: i32[] of the layer.
      config: as in :func:`attend`.

    Returns:
      [B, 1, heads, head_dim]; None where :func:`attend` is to read: a mask
      that is no :class:`CachedMask`, and where heads and their keys would part.
    """
    if not isinstance(spec.mask, CachedMask):
        return None

    def plain(*arrays: jax.Array) -> jax.Array:
        query, keys, values, index, mask, *_ = arrays
        allowed = (mask != 0)[:, None]
        return _attend(query, keys[index], values[index], allowed, config)

    read = functools.partial(
        jax.lax.platform_dependent,
        tpu=functools.partial(
            flash_decode.read,
            options=_options(config),
            usual=_usual(config, spec.mask.usual),
        ),
        default=plain,
    )
    mask = flash_decode.as_numbers(layer_mask(spec, window)[:, 0, 0])
    first = jnp.argmax(mask[:, 0], axis=1).astype(jnp.int32)
    keys, values = cache.keys, cache.values
    if index is None:
        folded = unfold_heads(keys, values, query.shape[0])
        index, (keys, values) = 0, (x[None] for x in folded)
    return over_heads(
        read, query, keys, values, jnp.asarray(index),
        mask, first, spec.mask.length - 1,
    )  # fmt: skip


def _usual(config: DecoderConfig, length: int) -> int:
    """Return the keys that a layer reads, averaged over layers."""
    return int(np.minimum(layer_windows(config), length).mean())


def _attend_long(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: IntervalMask | jax.Array,
    read: Callable[..., jax.Array],
) -> jax.Array:
    """Attend, a block of queries at a time where there are many.

    A block takes queries from all over the sequence, so that each device of a
    mesh that spreads them has its share of every block.
    """
    length, keys = query.shape[1], key.shape[2]
    if not _is_long(length, keys):
        return read(query, key, value, _dense(mask), config)
    block = _block(keys)
    count = -(-length // block)
    # The cotangents of a loop's constants are summed in their own type.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def of_block(query: jax.Array, mask: Any) -> jax.Array:
        # A mask that waits for the queries cannot be made, for all blocks at
        # once, ahead of the loop and kept for the backward pass.
        query, mask = jax.lax.optimization_barrier((query, mask))
        narrow = (x.astype(query.dtype) for x in wide)
        return read(query, *narrow, _dense(whole(mask)), config)

    def split(x: jax.Array, axis: int = 1) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * block - length)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], block, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    if isinstance(mask, IntervalMask):
        names = ("begin", "prefix", "first", "last")
        parts = {name: split(getattr(mask, name)) for name in names}
    else:
        parts = split(mask, 2)

    def whole(part: Any) -> IntervalMask | jax.Array:
        return mask.replace(**part) if isinstance(part, dict) else part

    _, out = jax.lax.scan(
        lambda _, part: (None, of_block(*part)), None, (split(query), parts)
    )
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(out.shape[0], count * block, *out.shape[3:])
    return out[:, :length]


def _dense(mask: IntervalMask | jax.Array) -> jax.Array:
    """Return a mask as bool[B, 1, S, L]."""
    return mask.dense()[:, None] if isinstance(mask, IntervalMask) else mask


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    config: DecoderConfig,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attend with all scores at once."""
    rows, length, _, size = query.shape
    groups, keys = key.shape[1:3]
    # Queries that share keys are the rows of one product, tokens first: a mesh
    # may spread them. One dimension of products where none spreads both.
    products = (rows, groups) if mesh_in_use() else (rows * groups,)
    grouped = query.reshape(rows, length, groups, -1, size)
    grouped = jnp.swapaxes(grouped, 1, 2).reshape(*products, -1, size)
    key, value = (x.reshape(*products, keys, size) for x in (key, value))
    scores = jnp.einsum(
        "...qd,...ld->...ql", grouped, key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * config.attention_scale, config.attention_softcap)
    scores = scores.reshape(rows, groups, length, -1, keys)
    # Finite: a row of padding must not be nan.
    mask = mask[:, :, :, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.reshape(groups, 1, -1, 1)
        most = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        most = jax.lax.stop_gradient(most)
        weights = jnp.exp(scores - most)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (total + jnp.exp(sinks - most))
    weights = weights.astype(value.dtype)
    weights = weights.reshape(*products, -1, keys)
    out = jnp.einsum("...ql,...ld->...qd", weights, value)
    out = out.reshape(rows, groups, length, -1, size)
    return jnp.swapaxes(out, 1, 2).reshape(query.shape)


def _attend_fused(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """Attend by cuDNN where it is there, else with all scores at once."""
    if cudnn.takes(query, config.attention_softcap):
        return cudnn.attend(query, key, value, mask, config.attention_scale)
    return _attend(query, key, value, mask, config)


def _options(config: DecoderConfig) -> flash.Options:
    return flash.Options(config.attention_scale, config.attention_softcap)
