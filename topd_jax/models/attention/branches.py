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

from topd_jax.models.attention import flash
from topd_jax.models.attention.flash_kernels import MASKED_SCORE
from topd_jax.models.attention.masks import BranchMask
from topd_jax.types import soft_cap

# Scores of one head and row that exist at once (16 MB in float32).
_SCORES = 1 << 22

# Attention f32[B, M, G, R, D], and its log-normalizer f32[B, M, G, R].
_Part = tuple[jax.Array, jax.Array]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: flash.KernelMask,
    *,
    options: flash.Options,
    read: int,
    kernel: bool = False,
) -> jax.Array:
    """Attend from the newest token of each branch.

    Args:
      query: [B, M, heads, head_dim].
      key: [B, L + M * (K - 1), kv_heads, head_dim]: L keys that were read,
        then M a step.
      value: the same.
      mask: of :func:`kernel_mask`.
      options: scale and soft cap.
      read: L.
      kernel: read the prefix by the kernels of
        :mod:`topd_jax.models.attention.flash` where the platform is a TPU.

    Returns:
      [B, M, heads, head_dim] in the query's dtype.
    """
    *most, _, size = query.shape
    grouped = query.reshape(*most, key.shape[2], -1, size)
    before = mask._replace(
        exists=mask.exists[:, :read],
        key_positions=None
        if mask.key_positions is None
        else mask.key_positions[:, :read],
    )
    prefix = functools.partial(_prefix, options=options)
    if kernel:
        by_kernel = functools.partial(_by_kernel, options=options)
        platform = jax.lax.platform_dependent
        prefix = (
            by_kernel
            if options.interpret
            else functools.partial(platform, tpu=by_kernel, default=prefix)
        )
    parts = (
        prefix(grouped, key[:, :read], value[:, :read], before),
        _own_keys(grouped, key[:, read:], value[:, read:], mask, options, read),
    )
    return _joined(parts).astype(query.dtype).reshape(query.shape)


def kernel_mask(
    branches: BranchMask,
    query_positions: jax.Array | None,
    key_positions: jax.Array | None,
    window: jax.Array,
) -> flash.KernelMask:
    """Return the mask of branches as :func:`attend` takes it.

    Args:
      branches: the keys of each branch.
      query_positions: i32[B, M]; None where no layer slides.
      key_positions: i32[B, L + M * (K - 1)], or None.
      window: i32[] of the layer.
    """
    begin, end = jnp.ones_like(branches.prefix), jnp.zeros_like(branches.prefix)
    return flash.KernelMask(
        branches.exists,
        branches.prefix,
        begin,
        end,
        query_positions,
        key_positions,
        window,
    )


def _joined(parts: tuple[_Part, ...]) -> jax.Array:
    outs, normalizers = (jnp.stack(x) for x in zip(*parts, strict=True))
    weights = jax.nn.softmax(normalizers, axis=0)
    return jnp.sum(outs * weights[..., None], axis=0)


def _own_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: flash.KernelMask,
    options: flash.Options,
    read: int,
) -> _Part:
    """Attend to the keys of a token's own branch."""

    def by_branch(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, query.shape[1], *x.shape[2:])

    key, value = by_branch(key), by_branch(value)
    scores = jnp.einsum(
        "bmgrd,bkmgd->bmgrk", query, key, preferred_element_type=jnp.float32
    )
    allowed = by_branch(mask.exists[:, read:])
    if mask.key_positions is not None:
        back = mask.query_positions[:, None] - by_branch(
            mask.key_positions[:, read:]
        )
        allowed &= back < mask.window
    allowed = jnp.moveaxis(allowed, 1, 2)[:, :, None, None]
    weights, normalizer = _softmax(scores, allowed, options)
    out = jnp.einsum(
        "bmgrk,bkmgd->bmgrd", weights.astype(value.dtype), value,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out, normalizer


def _prefix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: flash.KernelMask,
    options: flash.Options,
) -> _Part:
    """Attend to the prefixes; some branches at a time where it is long."""
    keys = jnp.arange(key.shape[1])

    def of_one(
        query: jax.Array, prefix: jax.Array, row: jax.Array | None
    ) -> _Part:
        allowed = mask.exists & (keys < prefix[:, None])
        if row is not None:
            allowed &= row[:, None] - mask.key_positions < mask.window
        scores = jnp.einsum(
            "bgrd,blgd->bgrl", query, key, preferred_element_type=jnp.float32
        )
        weights, normalizer = _softmax(scores, allowed[:, None, None], options)
        out = jnp.einsum(
            "bgrl,blgd->bgrd", weights.astype(value.dtype), value,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return out, normalizer

    given = (query, mask.prefix, mask.query_positions)
    count = query.shape[1]
    together = max(_SCORES // max(key.shape[1], 1), 1)
    if count <= together:
        return jax.vmap(of_one, in_axes=1, out_axes=1)(*given)
    given = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), given)
    parts = jax.lax.map(lambda x: of_one(*x), given, batch_size=together)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), parts)


def _softmax(
    scores: jax.Array, mask: jax.Array, options: flash.Options
) -> tuple[jax.Array, jax.Array]:
    """Return softmax, 0 where masked, and the log-normalizers."""
    scores = soft_cap(scores * options.scale, options.cap)
    scores = jnp.where(mask, scores, MASKED_SCORE)
    normalizer = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - normalizer[..., None])
    return jnp.where(mask, weights, 0.0), normalizer


def _by_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: flash.KernelMask,
    options: flash.Options,
) -> _Part:
    """Compute :func:`_prefix` on a TPU."""
    rows, count, groups, shared, size = query.shape
    flat = query.reshape(rows, count, groups * shared, size)
    out, normalizer = flash.forward(
        flat, key, value, mask, options, causal=False
    )
    normalizer = normalizer.reshape(rows, groups, -1, shared)[:, :, :count]
    out = out.reshape(query.shape).astype(jnp.float32)
    return out, jnp.moveaxis(normalizer, 1, 2)
