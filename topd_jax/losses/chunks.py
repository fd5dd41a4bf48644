"""Chunks of tokens against an output head: the logits never exist at once.

Two operations that :mod:`topd_jax.losses.fused` is made of.
:func:`over_tokens` scans a function over chunks of tokens. :func:`per_token`
and :func:`weighted_sum` apply a loss to the logits of each chunk and know its
gradient: ``jax.vjp`` gives the chunk's cotangent of its logits, which is
multiplied into states and head at once and dropped (the scheme of Liger
Kernel, arXiv:2410.10989, §3.2). Mesh-agnostic: a
:class:`~topd_jax.types.Layout` says how large chunks are and where they lie.

In their arguments, ``constants`` is what every chunk sees and ``rows`` what is
cut along the tokens beside the states; neither is differentiated.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.losses.log_probs import accumulation_dtype
from topd_jax.losses.reverse_mode import reverse_mode_only
from topd_jax.types import Head, Layout, head_cap, head_rows, soft_cap

_BLOCK_BYTES = 32 * 2**20
_FEWEST_TOKENS, _MOST_TOKENS = 256, 4096


class ChunkedLoss(NamedTuple):
    """Hold a loss and its layout, hashable for custom_vjp.

    Attributes:
      loss: (logits f32[R, V], constants, rows [R, ...]) -> f32[R].
      layout: chunks and mesh.
      cap: ``head_cap`` of the head whose plain rows are differentiated.
    """

    loss: Callable[[jax.Array, Any, Any], jax.Array]
    layout: Layout
    cap: float | None

    def of_products(
        self, products: jax.Array, constants: Any, rows: Any
    ) -> jax.Array:
        """Compute the loss of states times rows, f32[R, V], not yet capped."""
        return self.loss(soft_cap(products, self.cap), constants, rows)


def chunk_tokens(vocab: int, layout: Layout) -> int:
    """Choose how many tokens a chunk has.

    As many as make one float32 block of logits 32 MiB, but 256 to 4096: with
    fewer, reading the head dominates. All of it per device: tokens are spread
    over the devices that hold rows, logits also over those that hold the
    vocabulary. Three to five such blocks live at a time.

    Args:
      vocab: V, the ids that logits are computed for.
      layout: whose ``chunk_size`` wins, where it has one.

    Returns:
      Tokens a chunk, over all devices.
    """
    if layout.chunk_size is not None:
        return layout.chunk_size
    block = 4 * vocab / layout.ways_of("vocab")
    tokens = min(max(int(_BLOCK_BYTES / block), _FEWEST_TOKENS), _MOST_TOKENS)
    return tokens * layout.ways_of("tokens")


def gathered(head: Head, layout: Layout) -> Head:
    """Gather the width of a head once, before a loop over chunks.

    Where the head is spread over its width the compiler would otherwise
    gather it at every chunk.

    Args:
      head: [V, D].
      layout: chunks and mesh.

    Returns:
      The same numbers, still spread over the vocabulary.
    """
    return jax.tree.map(lambda x: layout.constrain(x, "vocab", None), head)


def over_tokens(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    arrays: Any,
    shape: tuple[int, ...],
    vocab: int,
    layout: Layout,
) -> tuple[Any, Any]:
    """Scan step(carry, chunk) -> (carry, outputs) over chunks of tokens.

    Only the token axis is cut: rows stay on the devices that hold them. A
    chunk takes tokens from all over the axis, so that each device has its
    share of every chunk. Within a chunk both are flattened to R. The last
    chunk is padded with zeros, whose outputs are dropped: what step adds to
    the carry for a zero row must be zero.

    Args:
      step: maps leaves [R, ...] to outputs [R, ...].
      carry: what step hands on.
      arrays: pytree of [*shape, ...].
      shape: leading dimensions and, last, the token axis.
      vocab: V, which decides about R, the tokens of a chunk.
      layout: chunks and mesh; one chunk runs without a scan.

    Returns:
      (carry, outputs as [*shape, ...]).
    """
    *lead, length = shape
    axis = len(lead)
    columns = max(chunk_tokens(vocab, layout) // max(math.prod(lead), 1), 1)
    count = max(math.ceil(length / columns), 1)
    # Even chunks need the least padding; of each a device has an even share.
    share = layout.ways_of("sequence")
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


def unembed_rows(hidden: jax.Array, head: Head, layout: Layout) -> jax.Array:
    """Compute the logits of flattened tokens, with float32 sums.

    Args:
      hidden: [R, D].
      head: [V, D]; a capped one bounds them.
      layout: chunks and mesh.

    Returns:
      f32[R, V] (f64 for f64).
    """
    logits = _product(hidden, head_rows(head), 1, 1)
    logits = soft_cap(logits, head_cap(head))
    return layout.constrain(logits, "tokens", "vocab")


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
    """Compute every token's loss; the backward pass recomputes each chunk.

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
    """Compute sum(weights * losses) with its gradients in the forward pass.

    A token of weight 0 counts for nothing, whatever its loss.

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
    return _total(weights, token_losses), token_losses


def _total(weights: jax.Array, token_losses: jax.Array) -> jax.Array:
    # Selected before they are added: 0 * NaN would be NaN.
    return jnp.sum(jnp.where(weights != 0, weights * token_losses, 0))


def _over_chunks(
    chunked: ChunkedLoss,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> jax.Array:
    head = gathered(head, chunked.layout)

    def losses_of(_: None, chunk: tuple) -> tuple[None, jax.Array]:
        states, rest = chunk
        logits = unembed_rows(states, head, chunked.layout)
        return None, chunked.of_products(logits, constants, rest)

    return over_tokens(
        losses_of, None, (hidden, rows), hidden.shape[:-1],
        head.shape[0], chunked.layout,
    )[1]  # fmt: skip


def _with_gradients(
    chunked: ChunkedLoss,
    weights: jax.Array,
    hidden: jax.Array,
    head: jax.Array,
    constants: Any,
    rows: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute losses [..., T] and d(sum weights * losses)/d(hidden, head)."""
    narrow = jnp.promote_types(hidden.dtype, head.dtype)
    wide = accumulation_dtype(hidden, head)
    layout = chunked.layout
    # Devices that have tokens, and so a sum, of their own.
    rows_held = hidden.shape[0] if hidden.ndim > 2 else 1
    ways, share = layout.ways_of("tokens"), layout.ways_of("sequence")
    parts = 1 if rows_held * share % ways else ways
    head = gathered(head, layout)

    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple]:
        states, weight, rest = chunk
        token_losses, backward = jax.vjp(
            lambda logits: chunked.of_products(logits, constants, rest),
            unembed_rows(states, head, layout),
        )
        counts = (weight != 0)[:, None]
        (cotangent,) = backward(weight)
        # The products run in the precision of the model, as a dense backward
        # pass would; their sums are float32.
        cotangent = jnp.where(counts, cotangent, 0).astype(narrow)
        on_states = _product(cotangent, head, 1, 0)
        states = jnp.where(counts, states, 0)
        on_head = _by_parts(states, cotangent, parts, layout)
        return total + on_head, (token_losses, on_states)

    total = jnp.zeros((parts, *head.shape[::-1]), wide)
    total, (token_losses, on_hidden) = over_tokens(
        add,
        layout.constrain(total, "tokens", None, "vocab"),
        (hidden, weights, rows),
        hidden.shape[:-1],
        head.shape[0],
        layout,
    )
    on_head = layout.constrain(jnp.sum(total, axis=0), "embed", "vocab")
    return token_losses, (on_hidden, on_head.T)


def _by_parts(
    states: jax.Array, cotangent: jax.Array, parts: int, layout: Layout
) -> jax.Array:
    """Compute the head's gradient of each part of the rows: [parts, D, V].

    Were the parts added up here, the devices would exchange an array as large
    as the head at every chunk; now they do once, after all of them.

    Args:
      states: [R, D].
      cotangent: [R, V] of the logits.
      parts: that R divides into.
      layout: chunks and mesh.
    """
    if parts == 1:
        # [D, V], because this product reads both operands in rows.
        return _product(states, cotangent, 0, 0)[None]
    states, cotangent = (
        layout.constrain(x.reshape(parts, -1, x.shape[1]), "tokens", None, axis)
        for x, axis in ((states, None), (cotangent, "vocab"))
    )
    products = jax.lax.dot_general(
        states,
        cotangent.astype(states.dtype),
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=accumulation_dtype(states, cotangent),
    )
    return layout.constrain(products, "tokens", None, "vocab")


def _per_token_forward(chunked: ChunkedLoss, *arguments: Any) -> tuple:
    return _over_chunks(chunked, *arguments), arguments


def _per_token_backward(
    chunked: ChunkedLoss, arguments: tuple, cotangent: jax.Array
) -> tuple:
    _, gradients = _with_gradients(chunked, cotangent, *arguments)
    return *_cast(gradients, arguments[:2]), None, None


per_token.defvjp(_per_token_forward, _per_token_backward)
per_token = reverse_mode_only(per_token)


def _weighted_sum_forward(
    chunked: ChunkedLoss, weights: jax.Array, *arguments: Any
) -> tuple:
    token_losses, gradients = _with_gradients(chunked, weights, *arguments)
    # Empty arrays carry the types that the gradients must be returned in.
    like = tuple(x[:0] for x in arguments[:2])
    total = _total(weights, token_losses)
    return (total, token_losses), (gradients, like)


def _weighted_sum_backward(
    chunked: ChunkedLoss, residuals: tuple, cotangents: tuple
) -> tuple:
    gradients, like = residuals
    scaled = [cotangents[0] * g for g in gradients]
    return None, *_cast(scaled, like), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
weighted_sum = reverse_mode_only(weighted_sum)


def _cast(gradients: Any, like: Any) -> tuple[jax.Array, ...]:
    return tuple(
        g.astype(x.dtype) for g, x in zip(gradients, like, strict=True)
    )
