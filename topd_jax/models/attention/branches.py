"""Attention of branches that are written side by side, a token of each.

What a token sees is in two parts of the cache: a prefix of the columns that
were read, which the branches of a row share, and behind them the columns of its
own branch. Each part is read by itself, so that no token is compared with the
columns of other branches, and the parts are put together by their
log-normalisers (FlashAttention-2, arXiv:2307.08691, section 3.1). M branches of
K tokens cost M K (L + K), not M K (L + M K). Inference only. Ours.
"""

import functools

import jax
import jax.numpy as jnp

from topd_jax.models.attention import flash
from topd_jax.models.attention.flash_kernels import UNSEEN
from topd_jax.models.attention.masks import Branching
from topd_jax.types import soft_cap

# Scores of one head and row that exist at once (16 MB in float32).
_SCORES = 1 << 22

# Attention f32[B, M, G, R, D], and its log-normaliser f32[B, M, G, R].
_Part = tuple[jax.Array, jax.Array]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: flash.Seen,
    *,
    options: flash.Options,
    read: int,
    kernel: bool = False,
) -> jax.Array:
    """Attention of the newest token of each branch.

    Args:
      query: [B, M, heads, head_dim].
      key: [B, L + M * (K - 1), kv_heads, head_dim]: L columns that were read,
        then M a step.
      value: the same.
      seen: of :func:`seen_of`.
      options: scale and soft cap.
      read: L.
      kernel: read the prefix by the kernels of
        :mod:`topd_jax.models.attention.flash` where the platform is a TPU.

    Returns:
      [B, M, heads, head_dim] in the query's dtype.
    """
    *most, _, size = query.shape
    grouped = query.reshape(*most, key.shape[2], -1, size)
    before = seen._replace(
        exists=seen.exists[:, :read],
        columns=None if seen.columns is None else seen.columns[:, :read],
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
        _own(grouped, key[:, read:], value[:, read:], seen, options, read),
    )
    return _joined(parts).astype(query.dtype).reshape(query.shape)


def seen_of(
    sees: Branching,
    rows: jax.Array | None,
    columns: jax.Array | None,
    reach: jax.Array,
) -> flash.Seen:
    """What :func:`attend` is told of what the tokens of branches see.

    Args:
      sees: which columns.
      rows: i32[B, M] positions of the tokens; None where no layer slides.
      columns: i32[B, L + M * (K - 1)] positions of the columns, or None.
      reach: i32[] of the layer.
    """
    begin, end = jnp.ones_like(sees.prefix), jnp.zeros_like(sees.prefix)
    return flash.Seen(
        sees.exists, sees.prefix, begin, end, rows, columns, reach
    )


def _joined(parts: tuple[_Part, ...]) -> jax.Array:
    outs, normalisers = (jnp.stack(x) for x in zip(*parts, strict=True))
    shares = jax.nn.softmax(normalisers, axis=0)
    return jnp.sum(outs * shares[..., None], axis=0)


def _own(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: flash.Seen,
    options: flash.Options,
    read: int,
) -> _Part:
    """Attention to the columns of one's own branch."""

    def by_branch(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, query.shape[1], *x.shape[2:])

    key, value = by_branch(key), by_branch(value)
    scores = jnp.einsum(
        "bmgrd,bkmgd->bmgrk", query, key, preferred_element_type=jnp.float32
    )
    mask = by_branch(seen.exists[:, read:])
    if seen.columns is not None:
        back = seen.rows[:, None] - by_branch(seen.columns[:, read:])
        mask &= back < seen.reach
    mask = jnp.moveaxis(mask, 1, 2)[:, :, None, None]
    shares, normaliser = _shares(scores, mask, options)
    out = jnp.einsum(
        "bmgrk,bkmgd->bmgrd", shares.astype(value.dtype), value,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out, normaliser


def _prefix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: flash.Seen,
    options: flash.Options,
) -> _Part:
    """Attention to the prefixes; some branches at a time where it is long."""
    columns = jnp.arange(key.shape[1])

    def of_one(
        query: jax.Array, prefix: jax.Array, row: jax.Array | None
    ) -> _Part:
        mask = seen.exists & (columns < prefix[:, None])
        if row is not None:
            mask &= row[:, None] - seen.columns < seen.reach
        scores = jnp.einsum(
            "bgrd,blgd->bgrl", query, key, preferred_element_type=jnp.float32
        )
        shares, normaliser = _shares(scores, mask[:, None, None], options)
        out = jnp.einsum(
            "bgrl,blgd->bgrd", shares.astype(value.dtype), value,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return out, normaliser

    given = (query, seen.prefix, seen.rows)
    count = query.shape[1]
    together = max(_SCORES // max(key.shape[1], 1), 1)
    if count <= together:
        return jax.vmap(of_one, in_axes=1, out_axes=1)(*given)
    given = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), given)
    parts = jax.lax.map(lambda x: of_one(*x), given, batch_size=together)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), parts)


def _shares(
    scores: jax.Array, mask: jax.Array, options: flash.Options
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis, and log-normalisers; zero where masked."""
    scores = soft_cap(scores * options.scale, options.cap)
    scores = jnp.where(mask, scores, UNSEEN)
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    shares = jnp.exp(scores - normaliser[..., None])
    return jnp.where(mask, shares, 0.0), normaliser


def _by_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: flash.Seen,
    options: flash.Options,
) -> _Part:
    """:func:`_prefix` on a TPU."""
    rows, count, groups, shared, size = query.shape
    flat = query.reshape(rows, count, groups * shared, size)
    out, normaliser = flash.forward(
        flat, key, value, seen, options, causal=False
    )
    normaliser = normaliser.reshape(rows, groups, -1, shared)[:, :, :count]
    out = out.reshape(query.shape).astype(jnp.float32)
    return out, jnp.moveaxis(normaliser, 1, 2)
