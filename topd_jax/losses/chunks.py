"""Chunks of tokens against an output head: logits that never exist at once.

Two operations that :mod:`topd_jax.losses.fused` is made of.
:func:`over_tokens` scans
a function over chunks of tokens. :func:`per_token` and :func:`weighted_sum`
apply a loss to the logits of each chunk and know its gradient: the chunk's
gradient with respect to its logits is taken by ``jax.vjp``, multiplied into
states and head at once, and forgotten (the scheme of Liger Kernel,
arXiv:2410.10989, §3.2).

In their arguments, ``constants`` is what every chunk sees and ``rows`` what is
cut along the tokens beside the states; neither is differentiated.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.losses.divergences import accumulation_dtype
from topd_jax.parallel.sharding import RULES, constrain, mesh_axes, mesh_in_use
from topd_jax.types import Head, head_cap, head_rows, soft_cap

_BLOCK_BYTES = 32 * 2**20
_FEWEST_TOKENS, _MOST_TOKENS = 256, 4096


class ChunkedLoss(NamedTuple):
    """A loss and its chunk: hashable, so that custom_vjp can hold it.

    Attributes:
      loss: (logits f32[R, V], constants, rows [R, ...]) -> f32[R].
      chunk_size: R, about.
    """

    loss: Callable[[jax.Array, Any, Any], jax.Array]
    chunk_size: int


def chunked_loss(
    loss: Callable[[jax.Array, Any, Any], jax.Array],
    head: Head,
    chunk_size: int,
) -> ChunkedLoss:
    """A loss of the logits of a head, for rows that know no bound.

    :func:`per_token` and :func:`weighted_sum` differentiate plain rows; where
    the head bounds its logits the loss does so first.

    Args:
      loss: see :class:`ChunkedLoss`.
      head: [V, D] that the logits are of.
      chunk_size: tokens a chunk.

    Returns:
      What to call them with, beside ``head_rows(head)``.
    """
    if (cap := head_cap(head)) is not None:
        loss = functools.partial(_capped, loss, cap)
    return ChunkedLoss(loss, chunk_size)


def _capped(
    loss: Callable[[jax.Array, Any, Any], jax.Array],
    cap: float,
    logits: jax.Array,
    constants: Any,
    rows: Any,
) -> jax.Array:
    return loss(soft_cap(logits, cap), constants, rows)


def chunk_tokens(vocab: int) -> int:
    """How many tokens a chunk should have (ours).

    As many as make one float32 block of logits 32 MiB; but at least 256,
    below which a head is read from memory more often than it is worked with,
    and at most 4096. All of it per device of the mesh in use, if any: tokens
    are spread over the devices that hold rows, logits also over those that
    hold the vocabulary. Three to five such blocks live at a time.

    Args:
      vocab: V, the ids that logits are computed for.

    Returns:
      Tokens a chunk, over all devices.
    """
    block = 4 * vocab / _ways("vocab")
    tokens = min(max(int(_BLOCK_BYTES / block), _FEWEST_TOKENS), _MOST_TOKENS)
    return tokens * _ways("tokens")


def _ways(axis: str) -> int:
    mesh = mesh_in_use()
    if mesh is None:
        return 1
    return math.prod(mesh.shape[name] for name in mesh_axes(RULES[axis]))


def gathered(head: Head) -> Head:
    """A head that every device has the width of, for a loop over chunks.

    Where the head is spread over its width the compiler would otherwise
    gather it at every chunk.

    Args:
      head: [V, D].

    Returns:
      The same numbers, still spread over the vocabulary.
    """
    return jax.tree.map(lambda x: constrain(x, "vocab", None), head)


def over_tokens(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    arrays: Any,
    shape: tuple[int, ...],
    chunk_size: int,
) -> tuple[Any, Any]:
    """Scans step(carry, chunk) -> (carry, outputs) over chunks of tokens.

    Only the token axis is cut, so that rows stay on the devices that hold
    them, and a chunk takes tokens from all over it, so that each device that
    holds a stretch of them has its share of every chunk; within a chunk both
    are flattened to R, because a weight gradient of 3-D operands takes three
    times as long on CPU. The last ones are padded with zeros, whose outputs
    are dropped: what step adds to the carry for a zero row must be zero.

    Args:
      step: maps leaves [R, ...] to outputs [R, ...].
      carry: what step hands on.
      arrays: pytree of [*shape, ...].
      shape: leading dimensions and, last, the token axis.
      chunk_size: R, about; one chunk runs without a scan.

    Returns:
      (carry, outputs as [*shape, ...]).
    """
    *lead, length = shape
    axis = len(lead)
    columns = max(chunk_size // max(math.prod(lead), 1), 1)
    count = max(math.ceil(length / columns), 1)
    # Even chunks need the least padding; of each a device has an even share.
    share = _ways("sequence")
    columns = math.ceil(length / count / share) * share

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * columns - length)
        x = jnp.pad(x, pad)
        x = x.reshape(*lead, columns, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *lead, columns, *x.shape[2:])
        x = jnp.moveaxis(x, 0, axis + 1)
        x = x.reshape(*lead, count * columns, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    def flat_step(carry: Any, chunk: Any) -> tuple[Any, Any]:
        flat = (math.prod(lead) * columns,)
        rows = jax.tree.map(
            lambda x: x.reshape(flat + x.shape[axis + 1 :]), chunk
        )
        return step(carry, rows)

    if count == 1 and columns == length:
        carry, outputs = flat_step(carry, arrays)
        outputs = jax.tree.map(lambda x: x[None], outputs)
    else:
        arrays = jax.tree.map(split, arrays)
        carry, outputs = jax.lax.scan(flat_step, carry, arrays)
    return carry, jax.tree.map(join, outputs)


def unembed_rows(hidden: jax.Array, head: Head) -> jax.Array:
    """Logits of flattened tokens, adding up in float32.

    Args:
      hidden: [R, D].
      head: [V, D]; a capped one bounds them.

    Returns:
      f32[R, V] (f64 for f64).
    """
    logits = _product(hidden, head_rows(head), 1, 1)
    return constrain(soft_cap(logits, head_cap(head)), "tokens", "vocab")


def _product(x: jax.Array, y: jax.Array, i: int, j: int) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((i,), (j,)), ((), ())),
        preferred_element_type=accumulation_dtype(x, y),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token(
    chunked: ChunkedLoss,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> jax.Array:
    """The loss of every token; the backward pass computes each chunk again.

    Args:
      chunked: loss and chunk.
      hidden: [..., T, D] states.
      head: [V, D].
      constants: what every chunk sees; not differentiated.
      rows: pytree of [..., T, ...], cut along T; not differentiated.

    Returns:
      f32[..., T] (f64 for f64).
    """
    return _over_chunks(chunked, hidden, head, constants, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(
    chunked: ChunkedLoss,
    weights: jax.Array,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> tuple[jax.Array, jax.Array]:
    """sum(weights * losses), its gradients computed in the forward pass.

    Args:
      chunked: loss and chunk.
      weights: [..., T] in the accumulation type; not differentiated.
      hidden: [..., T, D] states.
      head: [V, D].
      constants: what every chunk sees; not differentiated.
      rows: pytree of [..., T, ...], cut along T; not differentiated.

    Returns:
      (f32[] sum, f32[..., T] losses, whose cotangent is ignored).
    """
    token_losses = _over_chunks(chunked, hidden, head, constants, rows)
    return jnp.sum(weights * token_losses), token_losses


def _over_chunks(
    chunked: ChunkedLoss,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> jax.Array:
    head = gathered(head)

    def losses_of(_: None, chunk: tuple) -> tuple[None, jax.Array]:
        states, rest = chunk
        logits = unembed_rows(states, head)
        return None, chunked.loss(logits, constants, rest)

    return over_tokens(
        losses_of, None, (hidden, rows), hidden.shape[:-1], chunked.chunk_size
    )[1]


def _with_gradients(
    chunked: ChunkedLoss,
    weights: jax.Array,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Losses [..., T] and d(sum weights * losses)/d(hidden, head)."""
    narrow = jnp.promote_types(hidden.dtype, head.dtype)
    wide = accumulation_dtype(hidden, head)
    parts = _parts(hidden.shape[0] if hidden.ndim > 2 else 1)
    head = gathered(head)

    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple]:
        states, weight, rest = chunk
        token_losses, backward = jax.vjp(
            lambda logits: chunked.loss(logits, constants, rest),
            unembed_rows(states, head),
        )
        (slope,) = backward(weight)
        # The products run in the precision of the model, as a dense backward
        # pass would; their sums are float32.
        slope = slope.astype(narrow)
        on_states = _product(slope, head, 1, 0)
        on_head = _by_parts(states, slope, parts)
        return total + on_head, (token_losses, on_states)

    total, (token_losses, on_hidden) = over_tokens(
        add,
        constrain(
            jnp.zeros((parts, *head.shape[::-1]), wide), "tokens", None, "vocab"
        ),
        (hidden, weights, rows),
        hidden.shape[:-1],
        chunked.chunk_size,
    )
    on_head = constrain(jnp.sum(total, axis=0), "embed", "vocab")
    return token_losses, (on_hidden, on_head.T)


def _parts(rows: int) -> int:
    """How many devices have tokens of their own, and so a sum of their own."""
    return 1 if rows % _ways("batch") else _ways("tokens")


def _by_parts(states: jax.Array, slope: jax.Array, parts: int) -> jax.Array:
    """The head's gradient of each part of the rows: [parts, D, V].

    Were the parts added up here, the devices would exchange an array as large
    as the head at every chunk; now they do once, after all of them.

    Args:
      states: [R, D].
      slope: [R, V].
      parts: that R divides into.
    """
    if parts == 1:
        # [D, V], because this product reads both operands in rows.
        return _product(states, slope, 0, 0)[None]
    states, slope = (
        constrain(x.reshape(parts, -1, x.shape[1]), "tokens", None, axis)
        for x, axis in ((states, None), (slope, "vocab"))
    )
    products = jax.lax.dot_general(
        states,
        slope.astype(states.dtype),
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=accumulation_dtype(states, slope),
    )
    return constrain(products, "tokens", None, "vocab")


def _per_token_forward(chunked: ChunkedLoss, *arguments: Any) -> tuple:
    return _over_chunks(chunked, *arguments), arguments


def _per_token_backward(
    chunked: ChunkedLoss, arguments: tuple, cotangent: jax.Array
) -> tuple:
    _, gradients = _with_gradients(chunked, cotangent, *arguments)
    return *_cast(gradients, arguments[:2]), None, None


per_token.defvjp(_per_token_forward, _per_token_backward)


def _weighted_sum_forward(
    chunked: ChunkedLoss, weights: jax.Array, *arguments: Any
) -> tuple:
    token_losses, gradients = _with_gradients(chunked, weights, *arguments)
    # Empty arrays carry the types that the gradients must be returned in.
    like = tuple(x[:0] for x in arguments[:2])
    total = jnp.sum(weights * token_losses)
    return (total, token_losses), (gradients, like)


def _weighted_sum_backward(
    chunked: ChunkedLoss, residuals: tuple, cotangents: tuple
) -> tuple:
    gradients, like = residuals
    scaled = [cotangents[0] * g for g in gradients]
    return None, *_cast(scaled, like), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _cast(gradients: Any, like: Any) -> tuple[jax.Array, ...]:
    return tuple(
        g.astype(x.dtype) for g, x in zip(gradients, like, strict=True)
    )
