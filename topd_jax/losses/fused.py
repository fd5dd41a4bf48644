"""Per-token losses from hidden states and output heads.

The logits of a batch, [B, T, V], are the largest array of a training step by
far: 37 times the hidden states at width 4096 and vocabulary 152k. Here they
exist for one chunk of tokens at a time (:mod:`topd_jax.losses.chunks`). Two
faces, which the paper does not have:

* :func:`fused_divergence` returns the loss of every token and recomputes each
  chunk in the backward pass;
* :func:`fused_weighted_sum` knows the weights beforehand, so it computes the
  gradients with respect to student states and head in the forward pass, and
  computes nothing twice.

Either way the head's gradient is summed over chunks in float32. The teacher
is data: no gradient flows to its states and head, nor to weights. A head may
bound its logits: each model's own bound applies before the temperature. Both
have a reverse-mode derivative only: ``jax.jvp`` of them raises an error.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.losses.chunks import (
    ChunkedLoss,
    gathered,
    over_tokens,
    per_token,
    unembed_rows,
    weighted_sum,
)
from topd_jax.losses.divergences import check_temperature, reverse_kl
from topd_jax.losses.log_probs import (
    accumulation_dtype,
    check_vocab,
    log_softmax,
    shared_vocab,
    token_logprobs,
)
from topd_jax.losses.token_losses import TokenLoss
from topd_jax.types import (
    ONE_DEVICE,
    Head,
    Layout,
    head_cap,
    head_rows,
    soft_cap,
)

NO_ROWS: Mapping[str, jax.Array] = {}


def fused_divergence(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    token_loss: TokenLoss = reverse_kl,
    *,
    rows: Mapping[str, jax.Array] = NO_ROWS,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Compute the loss of every token, recomputing chunks for the gradient.

    arXiv:2606.00305, §3 (the token loss), without its [B, T, V] logits.

    Args:
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      token_loss: :func:`~topd_jax.losses.divergences.reverse_kl` or any other
        :class:`TokenLoss`; options are bound by ``functools.partial``.
      rows: name -> [..., T, ...], passed to ``token_loss`` by name; data.
      temperature: divides both models' logits, above 0; no tau^2 factor. May
        be traced.
      vocab_size: ids that both models share; the smaller head unless given.
        Logits beyond are cut and both distributions renormalized; see
        :func:`dropped_mass`.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      f32[..., T] (f64 for f64); differentiable with respect to the student,
      in reverse mode.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = shared_vocab(*arrays, vocab_size)
    return per_token(
        _of_both(token_loss, student_head, layout),
        student_hidden,
        head_rows(student_head)[:vocab],
        _constants(arrays, vocab, temperature, layout),
        (teacher_hidden, dict(rows)),
    )


def fused_weighted_sum(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    weights: jax.Array,
    token_loss: TokenLoss = reverse_kl,
    *,
    rows: Mapping[str, jax.Array] = NO_ROWS,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, jax.Array]:
    """Compute sum_t weights_t * loss_t and its gradients in one pass.

    The objective of a step once its weights are known: mask, median caps and
    n-step weights are constants of it. Divide by the global token count
    outside. A call that is not differentiated computes no gradient.

    Args:
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      weights: f32[..., T]; a token of weight 0 counts for nothing, whatever
        its loss. Constants.
      token_loss: as in :func:`fused_divergence`, like the rest.
      rows: name -> [..., T, ...].
      temperature: divides both models' logits.
      vocab_size: ids that both models share.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      (f32[] the sum, f32[..., T] each token's loss, unweighted and stopped);
      f64 for f64.

    Raises:
      ValueError: for shapes or numbers that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> states, head = jnp.ones((3, 1)), jnp.array([[0.0], [1.0]])
      >>> weights = jnp.array([1.0, 1.0, 0.0])
      >>> total, _ = fused_weighted_sum(states, head, states, -head, weights)
      >>> round(float(total), 4)
      0.9242
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = shared_vocab(*arrays, vocab_size)
    if weights.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"weights{list(weights.shape)} must have one entry a token, "
            f"{list(student_hidden.shape[:-1])}"
        )
    total, token_losses = weighted_sum(
        _of_both(token_loss, student_head, layout),
        weights.astype(accumulation_dtype(*arrays)),
        student_hidden,
        head_rows(student_head)[:vocab],
        _constants(arrays, vocab, temperature, layout),
        (teacher_hidden, dict(rows)),
    )
    return total, jax.lax.stop_gradient(token_losses)


def fused_map(
    fn: Callable[..., Any],
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    *args: Any,
    layout: Layout = ONE_DEVICE,
) -> Any:
    """Compute any per-token statistics of both models in one pass.

    For metrics above all. Differentiable (the student), recomputing.

    Args:
      fn: (student_logp [R, V], teacher_logp [R, V], *rows of args [R, ...])
        -> pytree of [R, ...], for any number R of tokens, V the ids of the
        smaller head.
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      *args: pytrees of [..., T, ...], cut into chunks with the states.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      What fn returns, each leaf [..., T, ...].

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = shared_vocab(*arrays, None)
    teacher_head = jax.lax.stop_gradient(teacher_head[:vocab])
    teacher_head = gathered(teacher_head, layout)
    # Chunks' gradients of the head add up in the type that a scan is given.
    narrow, cap = head_rows(student_head)[:vocab], head_cap(student_head)
    wide = narrow.astype(accumulation_dtype(student_hidden, student_head))

    def compare(_: None, chunk: tuple) -> tuple[None, Any]:
        student, teacher, rest = chunk
        logits = unembed_rows(student, wide.astype(narrow.dtype), layout)
        logits = soft_cap(logits, cap)
        teacher_logits = unembed_rows(teacher, teacher_head, layout)
        both = log_softmax(logits), log_softmax(teacher_logits)
        return None, fn(*both, *rest)

    _, outputs = over_tokens(
        jax.checkpoint(compare),
        None,
        (student_hidden, jax.lax.stop_gradient(teacher_hidden), args),
        student_hidden.shape[:-1],
        vocab,
        layout,
    )
    return outputs


def fused_token_logprobs(
    hidden: jax.Array,
    head: Head,
    tokens: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Compute log p(y_t) of one model's tokens, recomputing for the gradient.

    Args:
      hidden: [..., T, D] final states, in the tokens' own coordinates.
      head: [V, D].
      tokens: i32[..., T], 0..vocab_size - 1; NaN outside.
      temperature: divides the logits, above 0.
      vocab_size: ids to normalize over; all of the head's unless given.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      f32[..., T] (f64 for f64); differentiable with respect to both.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    vocab = check_vocab(hidden, head, vocab_size)
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(
            f"tokens{list(tokens.shape)} must have one entry a state, "
            f"{list(hidden.shape[:-1])}"
        )
    return per_token(
        ChunkedLoss(_token_logprobs, layout, head_cap(head)),
        hidden,
        head_rows(head)[:vocab],
        _temperature(temperature, hidden, head),
        tokens,
    )


def fused_log_normalizer(
    hidden: jax.Array,
    head: Head,
    *,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Compute log sum_v exp <h_t, W[v]>, a chunk of logits at a time.

    Args:
      hidden: [..., T, D].
      head: [V, D].
      vocab_size: ids that exist, the first of the head's rows; all unless
        given.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      f32[..., T]; differentiable with respect to both.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    vocab = check_vocab(hidden, head, vocab_size)
    chunked = ChunkedLoss(_log_normalizer, layout, head_cap(head))
    return per_token(chunked, hidden, head_rows(head)[:vocab], None, None)


def dropped_mass(
    hidden: jax.Array,
    head: Head,
    vocab_size: int,
    *,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Compute the probability that the full softmax puts beyond shared ids.

    A head padded from 151,936 to 152,064 rows may hold anything there: large
    values mean that cutting changes the model.

    Args:
      hidden: [..., T, D] final states.
      head: [V, D].
      vocab_size: ids that are kept, at most V.
      layout: size of the chunks, and where they lie on a mesh.

    Returns:
      f32[..., T] (f64 for f64), 0..1.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    check_vocab(hidden, head, vocab_size)

    def beyond(_: None, states: jax.Array) -> tuple[None, jax.Array]:
        logp = log_softmax(unembed_rows(states, head, layout))
        return None, jnp.sum(jnp.exp(logp[:, vocab_size:]), axis=-1)

    _, mass = over_tokens(
        jax.checkpoint(beyond),
        None,
        hidden,
        hidden.shape[:-1],
        head.shape[0],
        layout,
    )
    return mass


def _of_both(
    token_loss: TokenLoss, student_head: Head, layout: Layout
) -> ChunkedLoss:
    loss = functools.partial(_both_logprobs, token_loss, layout)
    return ChunkedLoss(loss, layout, head_cap(student_head))


def _both_logprobs(
    token_loss: TokenLoss,
    layout: Layout,
    logits: jax.Array,
    constants: tuple[jax.Array, Head],
    rows: tuple[jax.Array, dict[str, jax.Array]],
) -> jax.Array:
    temperature, teacher_head = constants
    teacher_hidden, named = rows
    teacher_logits = unembed_rows(teacher_hidden, teacher_head, layout)
    return token_loss(
        log_softmax(logits / temperature),
        log_softmax(teacher_logits / temperature),
        **named,
    )


def _token_logprobs(
    logits: jax.Array, temperature: jax.Array, tokens: jax.Array
) -> jax.Array:
    return token_logprobs(logits / temperature, tokens)


def _log_normalizer(
    logits: jax.Array, constants: None, rows: None
) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def _constants(
    arrays: tuple[jax.Array, Head, jax.Array, Head],
    vocab: int,
    temperature: float | jax.Array,
    layout: Layout,
) -> tuple[jax.Array, Head]:
    """Return what every chunk sees: temperature and the teacher's head."""
    teacher_head = jax.lax.stop_gradient(arrays[3][:vocab])
    return _temperature(temperature, *arrays), gathered(teacher_head, layout)


def _temperature(
    temperature: float | jax.Array, *arrays: jax.Array
) -> jax.Array:
    check_temperature(temperature)
    return jnp.asarray(temperature, accumulation_dtype(*arrays))
