"""Per-token divergences from hidden states and output heads.

The logits of a batch, [B, T, V], are the largest array of a training step by
far: 37 times the hidden states at width 4096 and vocabulary 152k. Here they
exist for one chunk of tokens at a time (:mod:`topd_jax.losses.chunks`; size
from the
shapes, :func:`topd_jax.losses.chunks.chunk_tokens`). Two faces (ours):

* :func:`fused_divergence` returns the loss of every token and computes each
  chunk again in the backward pass;
* :func:`fused_weighted_sum` is told the weights beforehand, so it computes
  the gradients with respect to student states and head in the forward pass,
  and nothing is computed twice.

Either way the head's gradient is summed over chunks in float32. The teacher
is data: no gradient flows to its states and head, nor to weights. A head may
bound its logits (:mod:`topd_jax.types`): each model's own bound applies before
the temperature.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.losses import divergences
from topd_jax.losses.chunks import (
    chunk_tokens,
    chunked_loss,
    gathered,
    over_tokens,
    per_token,
    unembed_rows,
    weighted_sum,
)
from topd_jax.types import Head, head_cap, head_rows, soft_cap

# (student_logp [R, V], teacher_logp [R, V]) -> [R]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]

DIVERGENCES = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "jsd": divergences.generalized_jsd,
}


def fused_divergence(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    *,
    divergence: str | Divergence = "reverse_kl",
    beta: float = 0.5,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    log_floor: float = divergences.LOG_FLOOR,
) -> jax.Array:
    """The divergence of every token, recomputing chunks for the gradient.

    arXiv:2606.00305, §3 (the token loss), without its [B, T, V] logits.

    Args:
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      divergence: "reverse_kl", "forward_kl", "jsd", or any function
        (student_logp [R, V], teacher_logp [R, V]) -> [R].
      beta: of "jsd", 0..1; see
      :func:`topd_jax.losses.divergences.generalized_jsd`.
      temperature: divides both models' logits; no T^2 factor. May be traced.
      vocab_size: ids that both models share; the smaller head unless given.
        Logits beyond are cut and both distributions renormalised; see
        :func:`dropped_mass`.
      chunk_size: tokens a chunk; chosen from the shapes unless given.
      log_floor: see :mod:`topd_jax.losses.divergences`.

    Returns:
      f32[..., T] (f64 for f64); differentiable with respect to the student.

    Raises:
      ValueError: for shapes, names or numbers that do not fit.
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = _shared_vocab(*arrays, vocab_size)
    loss = functools.partial(
        _divergence_loss, _divergence(divergence, beta, log_floor)
    )
    return per_token(
        chunked_loss(loss, student_head, _chunk_size(chunk_size, vocab)),
        student_hidden,
        head_rows(student_head)[:vocab],
        (_temperature(temperature, *arrays), gathered(teacher_head[:vocab])),
        teacher_hidden,
    )


def fused_weighted_sum(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    weights: jax.Array,
    *,
    divergence: str | Divergence = "reverse_kl",
    beta: float = 0.5,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    log_floor: float = divergences.LOG_FLOOR,
) -> tuple[jax.Array, jax.Array]:
    """sum_t weights_t * divergence_t, with gradients made in the forward pass.

    The objective of a step once its weights are known: mask, median caps and
    n-step weights are constants of it. Divide by the global token count
    outside. A call that is not differentiated computes no gradient.

    Args:
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      weights: f32[..., T], 0 where nothing counts; constants.
      divergence: as in :func:`fused_divergence`, and so the rest.
      beta: of "jsd".
      temperature: divides both models' logits.
      vocab_size: ids that both models share.
      chunk_size: tokens a chunk.
      log_floor: see :mod:`topd_jax.losses.divergences`.

    Returns:
      (f32[] the sum, f32[..., T] each token's divergence, unweighted and
      stopped); f64 for f64.

    Raises:
      ValueError: for shapes, names or numbers that do not fit.
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = _shared_vocab(*arrays, vocab_size)
    if weights.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"weights{list(weights.shape)} must have one entry a token, "
            f"{list(student_hidden.shape[:-1])}"
        )
    loss = functools.partial(
        _divergence_loss, _divergence(divergence, beta, log_floor)
    )
    total, token_losses = weighted_sum(
        chunked_loss(loss, student_head, _chunk_size(chunk_size, vocab)),
        weights.astype(divergences.accumulation_dtype(*arrays)),
        student_hidden,
        head_rows(student_head)[:vocab],
        (_temperature(temperature, *arrays), gathered(teacher_head[:vocab])),
        teacher_hidden,
    )
    return total, jax.lax.stop_gradient(token_losses)


def fused_map(
    fn: Callable[..., Any],
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    *args: Any,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Any per-token statistics of both models, in one pass over the heads.

    For metrics above all. Differentiable (the student), recomputing.

    Args:
      fn: (student_logp [R, V], teacher_logp [R, V], *rows of args [R, ...])
        -> pytree of [R, ...], for any number R of tokens.
      student_hidden: [..., T, D] final states.
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      *args: pytrees of [..., T, ...], cut into chunks with the states.
      temperature: divides both models' logits.
      vocab_size: ids that both models share, as in :func:`fused_divergence`.
      chunk_size: tokens a chunk.

    Returns:
      What fn returns, each leaf [..., T, ...].

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
    vocab = _shared_vocab(*arrays, vocab_size)
    scale = _temperature(temperature, *arrays)
    # Chunks' gradients of the head add up in the type that a scan is given.
    narrow, cap = head_rows(student_head)[:vocab], head_cap(student_head)
    wide = narrow.astype(
        divergences.accumulation_dtype(student_hidden, student_head)
    )
    teacher_head = gathered(jax.lax.stop_gradient(teacher_head[:vocab]))

    def compare(_: None, chunk: tuple) -> tuple[None, Any]:
        student, teacher, rows = chunk
        logits = soft_cap(unembed_rows(student, wide.astype(narrow.dtype)), cap)
        return None, fn(
            divergences.log_softmax(logits / scale),
            divergences.log_softmax(
                unembed_rows(teacher, teacher_head) / scale
            ),
            *rows,
        )

    _, outputs = over_tokens(
        jax.checkpoint(compare),
        None,
        (student_hidden, jax.lax.stop_gradient(teacher_hidden), args),
        student_hidden.shape[:-1],
        _chunk_size(chunk_size, vocab),
    )
    return outputs


def fused_token_logprobs(
    hidden: jax.Array,
    head: Head,
    tokens: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """log p(y_t) of one model's tokens, recomputing chunks for the gradient.

    Args:
      hidden: [..., T, D] final states, in the tokens' own coordinates.
      head: [V, D].
      tokens: i32[..., T].
      temperature: divides the logits.
      vocab_size: ids to normalise over; all of the head's unless given.
      chunk_size: tokens a chunk.

    Returns:
      f32[..., T] (f64 for f64); differentiable with respect to both.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    vocab = _vocab(hidden, head, vocab_size)
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(
            f"tokens{list(tokens.shape)} must have one entry a state, "
            f"{list(hidden.shape[:-1])}"
        )
    return per_token(
        chunked_loss(_token_logprobs, head, _chunk_size(chunk_size, vocab)),
        hidden,
        head_rows(head)[:vocab],
        _temperature(temperature, hidden, head),
        tokens,
    )


def dropped_mass(
    hidden: jax.Array,
    head: Head,
    vocab_size: int,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int | None = None,
) -> jax.Array:
    """Probability that the full softmax puts beyond the shared ids.

    A head padded from 151,936 to 152,064 rows may hold anything there (trl
    issues 2215, 3028): large values mean that cutting changes the model.

    Args:
      hidden: [..., T, D] final states.
      head: [V, D].
      vocab_size: ids that are kept, at most V.
      temperature: divides the logits.
      chunk_size: tokens a chunk.

    Returns:
      f32[..., T] (f64 for f64), 0..1.

    Raises:
      ValueError: for shapes or numbers that do not fit.
    """
    _vocab(hidden, head, vocab_size)

    scale = _temperature(temperature, hidden, head)

    def beyond(_: None, states: jax.Array) -> tuple[None, jax.Array]:
        logp = divergences.log_softmax(unembed_rows(states, head) / scale)
        return None, jnp.sum(jnp.exp(logp[:, vocab_size:]), axis=-1)

    _, mass = over_tokens(
        jax.checkpoint(beyond),
        None,
        hidden,
        hidden.shape[:-1],
        _chunk_size(chunk_size, head.shape[0]),
    )
    return mass


def _divergence_loss(
    divergence: Divergence,
    logits: jax.Array,
    constants: tuple[jax.Array, jax.Array],
    teacher_hidden: jax.Array,
) -> jax.Array:
    temperature, teacher_head = constants
    teacher_logits = unembed_rows(teacher_hidden, teacher_head)
    return divergence(
        divergences.log_softmax(logits / temperature),
        divergences.log_softmax(teacher_logits / temperature),
    )


def _token_logprobs(
    logits: jax.Array, temperature: jax.Array, tokens: jax.Array
) -> jax.Array:
    return divergences.token_logprobs(logits / temperature, tokens)


def _divergence(
    divergence: str | Divergence, beta: float, log_floor: float
) -> Divergence:
    if callable(divergence):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r} is unknown; choose one of "
            f"{', '.join(DIVERGENCES)}, or pass a function of two logp arrays"
        )
    options = {"log_floor": log_floor}
    if divergence == "jsd":
        options["beta"] = divergences.checked_beta(beta)
    return functools.partial(DIVERGENCES[divergence], **options)


def _temperature(
    temperature: float | jax.Array, *arrays: jax.Array
) -> jax.Array:
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(
            f"temperature={temperature} must be positive; 1 leaves the logits "
            "as they are"
        )
    return jnp.asarray(temperature, divergences.accumulation_dtype(*arrays))


def _chunk_size(chunk_size: int | None, vocab: int) -> int:
    if chunk_size is None:
        return chunk_tokens(vocab)
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size={chunk_size} must be at least 1; None chooses it "
            "from the shapes"
        )
    return chunk_size


def _vocab(hidden: jax.Array, head: Head, vocab_size: int | None) -> int:
    if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"hidden{list(hidden.shape)} must be [..., T, D] and "
            f"head{list(head.shape)} [V, D] with the same D; a single state "
            "is hidden[None], a head stored [D, V] is head.T"
        )
    vocab = head.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab <= head.shape[0]:
        raise ValueError(
            f"vocab_size={vocab} must lie in 1..{head.shape[0]}, the rows of "
            "the head; None takes them all"
        )
    return vocab


def _shared_vocab(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    vocab_size: int | None,
) -> int:
    vocab = min(
        _vocab(student_hidden, student_head, vocab_size),
        _vocab(teacher_hidden, teacher_head, vocab_size),
    )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden{list(student_hidden.shape)} and teacher_hidden"
            f"{list(teacher_hidden.shape)} must agree on all but the width; "
            "shift both to completion coordinates first"
        )
    return vocab
