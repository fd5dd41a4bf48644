"""Attention of branches that are written side by side, a token of each.

The keys of a token are in two parts of the cache: a prefix of the keys that
were read, which the branches of a row share, and behind them the keys of its
own branch. Each part is read by itself, so that no token is compared with the
keys of other branches, and the parts are put together by their
log-normalizers (FlashAttention-2, arXiv:2307.08691, section 3.1). M branches of
K tokens cost M K (L + K), not M K (L + M K). Inference only.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.models.attention import flash
from topd_jax.models.attention.flash_kernels import MASKED_SCORE
from topd_jax.models.attention.masks import BranchMask, IntervalMask
from topd_jax.types import soft_cap

# Scores of one head and row that exist at once (16 MB in float32).
_SCORES = 1 << 22

# Attention f32[B, M, G, R, D], and its log-normalizer f32[B, M, G, R].
_Part = tuple[jax.Array, jax.Array]


@struct.dataclass
class BranchKeys:
    """Which keys of a layer the newest token of each branch attends to.

    Attributes:
      exists: bool[B, L] of the keys that were read.
      begin: i32[B, M] first key of the prefix, among those.
      prefix: i32[B, M] end of the prefix, exclusive.
      own: bool[B, M, K - 1] keys of the branch itself.
    """

    exists: jax.Array
    begin: jax.Array
    prefix: jax.Array
    own: jax.Array


def keys_of(
    mask: BranchMask,
    query_positions: jax.Array,
    key_positions: jax.Array | None,
    window: jax.Array,
) -> BranchKeys:
    """Return the mask of a layer as :func:`attend` takes it.

    Args:
      mask: the keys of each branch.
      query_positions: i32[B, M].
      key_positions: i32[B, L + M * (K - 1)], those that were read in order;
        None where no layer slides.
      window: i32[] of the layer.
    """
    rows, count = mask.prefix.shape

    def of_branches(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x[:, mask.read :].reshape(rows, -1, count), 1, 2)

    begin, own = jnp.zeros_like(mask.prefix), of_branches(mask.exists)
    if key_positions is not None:
        oldest = query_positions[..., None] - window + 1
        behind = key_positions[:, None, : mask.read] < oldest
        begin = jnp.sum(behind, axis=-1, dtype=begin.dtype)
        own &= of_branches(key_positions) >= oldest
    return BranchKeys(mask.exists[:, : mask.read], begin, mask.prefix, own)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: BranchKeys,
    *,
    options: flash.Options,
    sinks: jax.Array | None = None,
    kernel: bool = False,
) -> jax.Array:
    """Attend from the newest token of each branch.

    Args:
      query: [B, M, heads, head_dim].
      key: [B, kv_heads, L + M * (K - 1), head_dim]: L keys that were read,
        then M a step.
      value: the same.
      mask: of :func:`keys_of`.
      options: scale and soft cap.
      sinks: f32[heads] scores beside those of the keys, or None.
      kernel: read the prefix by the kernels of
        :mod:`topd_jax.models.attention.flash` where the platform is a TPU.

    Returns:
      [B, M, heads, head_dim] in the query's dtype.
    """
    rows, count, _, size = query.shape
    grouped = query.reshape(rows, count, key.shape[1], -1, size)
    read = mask.exists.shape[1]

    def of_branches(x: jax.Array) -> jax.Array:
        return x[:, :, read:].reshape(*x.shape[:2], -1, count, size)

    prefix = functools.partial(_prefix, options=options)
    if kernel:
        prefix = functools.partial(
            jax.lax.platform_dependent,
            tpu=functools.partial(_by_kernel, options=options),
            default=prefix,
        )
    own = jax.vmap(
        functools.partial(_part, options), in_axes=(1, 3, 3, 1), out_axes=1
    )
    parts = (
        prefix(grouped, key[:, :, :read], value[:, :, :read], mask),
        own(grouped, of_branches(key), of_branches(value), mask.own),
    )
    outs, normalizers = zip(*parts, strict=True)
    if sinks is not None:
        beside = sinks.reshape(normalizers[0].shape[2:])
        normalizers += (jnp.broadcast_to(beside, normalizers[0].shape),)
    outs, normalizers = jnp.stack(outs), jnp.stack(normalizers)
    weights = jax.nn.softmax(normalizers, axis=0)[:2]
    out = jnp.sum(outs * weights[..., None], axis=0)
    return out.astype(query.dtype).reshape(query.shape)


def _part(
    options: flash.Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
) -> _Part:
    """Attend from one branch, [B, G, R, D], to keys of mask bool[B, L]."""
    scores = jnp.einsum(
        "bgrd,bgld->bgrl", query, key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * options.scale, options.cap)
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, MASKED_SCORE)
    normalizer = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - normalizer[..., None]), 0.0)
    out = jnp.einsum(
        "bgrl,bgld->bgrd", weights.astype(value.dtype), value,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out, normalizer


def _prefix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: BranchKeys,
    options: flash.Options,
) -> _Part:
    """Attend to the prefixes; some branches at a time where it is long."""
    keys = jnp.arange(key.shape[2])

    def of_one(query: jax.Array, begin: jax.Array, end: jax.Array) -> _Part:
        allowed = (begin[:, None] <= keys) & (keys < end[:, None])
        return _part(options, query, key, value, mask.exists & allowed)

    together = max(_SCORES // max(key.shape[2], 1), 1)
    given = (query, mask.begin, mask.prefix)
    given = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), given)
    parts = jax.lax.map(lambda x: of_one(*x), given, batch_size=together)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), parts)


def _by_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: BranchKeys,
    options: flash.Options,
) -> _Part:
    """Compute :func:`_prefix` on a TPU."""
    rows, count, groups, shared, size = query.shape
    flat = query.reshape(rows, count, groups * shared, size)
    none = jnp.zeros_like(mask.prefix)
    intervals = IntervalMask(
        mask.exists, mask.begin, mask.prefix, none, none - 1
    )
    out, normalizer = flash.forward(
        flat, key, value, intervals, options, causal=False
    )
    normalizer = normalizer.reshape(rows, groups, -1, shared)[:, :, :count]
    out = out.reshape(query.shape).astype(jnp.float32)
    return out, jnp.moveaxis(normalizer, 1, 2)
