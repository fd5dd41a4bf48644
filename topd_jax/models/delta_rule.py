"""Gated delta-rule layers: a recurrent state in the place of attention.

Every head keeps a matrix S [key_dim, value_dim] that each token decays,
corrects and reads (Gated DeltaNet, arXiv:2412.06464, eq. 10)::

    S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T
    o_t = S_t^T q_t

Sequences are read a chunk of tokens at a time (section 3.2 there): within a
chunk by products of matrices, from chunk to chunk by a scan over states. A
token that is decoded is one step. All of this is float32, whatever the layer
computes with. Queries, keys and values pass a short causal convolution first,
of which the newest inputs are a state too.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens that products of matrices read at once.
_CHUNK = 64

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Inputs(NamedTuple):
    """What a delta rule reads of S tokens, float32.

    Attributes:
      query: [B, S, H, K], normalized and scaled.
      key: [B, S, H, K], normalized.
      value: [B, S, H, V].
      log_decay: [B, S, H], at most 0.
      rate: [B, S, H] of learning, 0 to 1.
      age: i32[B, S] tokens of its segment before each one; 0 forgets the
        state.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    rate: jax.Array
    age: jax.Array


def read_step(x: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read one token a row.

    Args:
      x: of one token, arrays [..., H, *] without a dimension of tokens; the
        age is not read.
      state: [..., H, K, V].

    Returns:
      (outputs [..., H, V], state).
    """
    state = state * jnp.exp(x.log_decay)[..., None, None]
    known = _dot("...kv,...k->...v", state, x.key)
    change = (x.value - known) * x.rate[..., None]
    state = state + x.key[..., None] * change[..., None, :]
    return _dot("...kv,...k->...v", state, x.query), state


def read_chunks(
    x: Inputs, state: jax.Array, leaves: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Read a sequence, a chunk of tokens at a time.

    Args:
      x: of S tokens.
      state: [B, H, K, V] before the first of them.
      leaves: i32[B, M] in 1..S; None asks for no states in between.

    Returns:
      (outputs [B, S, H, V]; the state after the last token, [B, H, K, V], or
      the states [B, M, H, K, V] after so many tokens as ``leaves`` says).
    """
    length = x.age.shape[1]
    chunk = min(_CHUNK, length)
    x = jax.tree.map(functools.partial(_chunks, size=chunk), x)
    segment = jnp.cumsum(x.age == 0, axis=-1)[:, :, None]
    decayed = jnp.cumsum(x.log_decay, axis=-1)
    # pair[i, j]: what is left at token i of what token j has written.
    order = jnp.arange(chunk)
    follows = order[:, None] >= order
    follows &= segment[..., :, None] == segment[..., None, :]
    back = decayed[..., :, None] - decayed[..., None, :]
    pair = jnp.exp(jnp.where(follows, back, -jnp.inf))
    left = jnp.exp(decayed) * (segment == 0)  # of the state before the chunk
    # The corrections solve (I + lower) new = rate * (value - key^T old).
    keys = x.key * x.rate[..., None]
    lower = _dot("...ik,...jk->...ij", keys, x.key) * pair
    given = jnp.concatenate(
        [x.value * x.rate[..., None], keys * left[..., None]], axis=-1
    )
    solved = _solve(lower, given)
    new, old = jnp.split(solved, [x.value.shape[-1]], axis=-1)
    within = _dot("...ik,...jk->...ij", x.query, x.key) * pair

    def step(state: jax.Array, part: tuple) -> tuple[jax.Array, tuple]:
        new, old, within, query, key, kept = part
        new = new - old @ state
        out = query @ state + within @ new
        after = state * kept + jnp.swapaxes(key, -1, -2) @ new
        return after, (out, new, None if leaves is None else state)

    with jax.default_matmul_precision("highest"):
        after, (out, new, states) = jax.lax.scan(
            step,
            state,
            (
                new, old, within, x.query * left[..., None],
                x.key * pair[..., -1, :, None], left[..., -1:, None],
            ),
        )  # fmt: skip
    out = jnp.moveaxis(out, (0, 3), (1, 2))
    out = out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]
    if leaves is None:
        return out, after
    # From the state before its chunk, and what the chunk adds up to it.
    row = jnp.arange(leaves.shape[0])[:, None]
    at = (leaves - 1) // chunk, row, slice(None), (leaves - 1) % chunk
    added = _dot(
        "bmhj,bmhjk,bmhjv->bmhkv",
        pair[at], x.key[at[:2]], new[at[:2]],
    )  # fmt: skip
    return out, added + left[at][..., None, None] * states[at[:2]]


@jax.checkpoint
def _solve(lower: jax.Array, given: jax.Array) -> jax.Array:
    """Solve (I + lower) x = given by products; see the diagonal as 0.

    The inverse of a block has those of its halves on the diagonal, and their
    product with the corner between them below. XLA's own solver waits for
    threads that it holds where many devices share a processor.
    """
    size = lower.shape[-1]
    order, inverse = jnp.arange(size), jnp.eye(size, dtype=lower.dtype)
    width = 1
    while width < size:
        half = order // width
        corner = (half[:, None] % 2 == 1) & (half[:, None] - 1 == half)
        below = _dot("...ij,...jk->...ik", inverse, lower * corner)
        inverse = inverse - _dot("...ij,...jk->...ik", below, inverse)
        width *= 2
    return _dot("...ij,...jk->...ik", inverse, given)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """Split [B, S, ...] into chunks, heads before tokens: [n, B, ..., C, *].

    Tokens of the padding write nothing, and no state decays there.
    """
    short = -x.shape[1] % size
    edge = jnp.ones if x.ndim == 2 else jnp.zeros  # an age of 0 would forget
    pad = edge((x.shape[0], short, *x.shape[2:]), x.dtype)
    x = jnp.concatenate([x, pad], axis=1)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    x = jnp.moveaxis(x, 1, 0)
    return jnp.swapaxes(x, 2, 3) if x.ndim > 3 else x
