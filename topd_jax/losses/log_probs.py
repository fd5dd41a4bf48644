"""Log-probabilities of tokens and distributions, finite where they can be.

Sums run in float32 whatever the inputs, float64 where those are. An
impossible token has log-probability :data:`LOWEST` rather than -inf, so that
0 * log 0 is 0 and no gradient is NaN. The paper has no such floors.
"""

import math
import numbers

import chex
import jax
import jax.numpy as jnp

from topd_jax.types import Head

# Stands for log 0. Far below any real log-probability, far above overflow.
LOWEST = -1e30
LOG_FLOOR = -100.0


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return float64 where any of the arrays is, float32 otherwise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def floored(x: jax.Array, floor: float = LOWEST) -> jax.Array:
    """Replace what is below a floor by it, in the accumulation type.

    Args:
      x: float[...].
      floor: no gradient flows below it.

    Returns:
      f32[...] (f64 for f64); NaN stays NaN.
    """
    # where, not maximum: the gradient of a maximum splits ties by division.
    x = x.astype(accumulation_dtype(x))
    return jnp.where(x <= floor, floor, x)  # NaN stays NaN


def within(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Replace what a sum leaves out by 0: else its NaN were a gradient's."""
    return x if where is None else jnp.where(where, x, 0)


def log_normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute log sum exp in two parts, to be subtracted one by one.

    Args:
      logits: f32[..., V], finite.

    Returns:
      (f32[..., 1] the largest, stopped; f32[..., 1] the log of the rest).
    """
    # Added up, a peak at LOWEST would swallow the logarithm.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True)
    return peak, jnp.log(total)


def check_pair(student_logp: jax.Array, teacher_logp: jax.Array) -> None:
    """Raise ValueError unless both are floats of one shape."""
    chex.assert_type([student_logp, teacher_logp], float)
    if jnp.shape(student_logp) != jnp.shape(teacher_logp):
        raise ValueError(
            f"student_logp{list(jnp.shape(student_logp))} and teacher_logp"
            f"{list(jnp.shape(teacher_logp))} must have the same shape "
            "[..., V]; cut both to the ids that they share first"
        )


def is_finite_number(value: object) -> bool:
    """Return whether an option is a plain number, not NaN or infinite."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_log_floor(log_floor: float) -> None:
    """Raise ValueError unless a floor is below 0, the logarithm of 1."""
    if not (is_finite_number(log_floor) and log_floor < 0):
        raise ValueError(
            f"log_floor={log_floor!r} must be a finite number below 0 nats; "
            "-100 is the default"
        )


def log_softmax(logits: jax.Array) -> jax.Array:
    """Compute log p(v) = logits_v - log sum_u exp(logits_u), finite for -inf.

    Args:
      logits: [..., V] raw scores of any float type.

    Returns:
      f32[..., V] (f64 for f64). A logit of -inf gives about ``LOWEST`` and no
      gradient; a row that is -inf throughout is uniform.

    Example:
      >>> import jax.numpy as jnp
      >>> log_softmax(jnp.array([0.0, -jnp.inf])).tolist()[0]
      0.0
    """
    chex.assert_type(logits, float)
    logits = floored(logits)
    peak, log_total = log_normalizer(logits)
    return logits - peak - log_total


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Compute log p(y) of one token a position, without a gather.

    Args:
      logits: [..., V] raw scores.
      tokens: i32[...] token ids, 0..V - 1. Any id may stand where a mask
        hides it; outside the vocabulary the result is NaN.

    Returns:
      f32[...] (f64 for f64).

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(token_logprobs(jnp.zeros(4), jnp.array(1))), 4)
      -1.3863
    """
    chex.assert_type([logits, tokens], [float, int])
    if jnp.shape(logits)[:-1] != jnp.shape(tokens):
        raise ValueError(
            f"tokens{list(jnp.shape(tokens))} must have one id a "
            f"distribution of {list(jnp.shape(logits))}, "
            f"{list(jnp.shape(logits)[:-1])}"
        )
    logits, tokens = floored(logits), jnp.asarray(tokens)
    peak, log_total = log_normalizer(logits)
    # One-hot, not gather: gather would materialise log-softmax, and its
    # gradient is a scatter.
    ids = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
    own = jnp.where(ids == tokens[..., None], logits, 0)
    logp = jnp.sum(own, axis=-1) - peak[..., 0] - log_total[..., 0]
    # A loss of 0 for a token that does not exist would pass unseen.
    exists = (tokens >= 0) & (tokens < logits.shape[-1])
    return jnp.where(exists, logp, jnp.nan)


def entropy(
    logp: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    """Compute H(p) = -sum_v p_v log p_v.

    Args:
      logp: [..., V] log-probabilities.
      axis: of the vocabulary.
      where: bool, broadcast to ``logp``: the ids that the sum runs over; all
        unless given.

    Returns:
      f32[...] (f64 for f64), nats, 0..log V.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(entropy(jnp.log(jnp.array([0.5, 0.5])))), 4)
      0.6931
    """
    chex.assert_type(logp, float)
    logp = within(floored(logp), where)
    return -jnp.sum(jnp.exp(logp) * logp, axis=axis, where=where)


def check_vocab(hidden: jax.Array, head: Head, vocab_size: int | None) -> int:
    """Return the ids that logits are computed for.

    Args:
      hidden: [..., T, D].
      head: [V, D].
      vocab_size: the first ids of the head, or None for all.

    Returns:
      1..V.

    Raises:
      ValueError: for shapes or a number that do not fit.
    """
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


def shared_vocab(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    vocab_size: int | None,
) -> int:
    """Return the ids that both models' heads have.

    Args:
      student_hidden: [..., T, D].
      student_head: [V, D].
      teacher_hidden: [..., T, D_teacher].
      teacher_head: [V_teacher, D_teacher].
      vocab_size: the first ids of both, or None for all they share.

    Returns:
      At least 1.

    Raises:
      ValueError: for shapes or a number that do not fit.
    """
    vocab = min(
        check_vocab(student_hidden, student_head, vocab_size),
        check_vocab(teacher_hidden, teacher_head, vocab_size),
    )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden{list(student_hidden.shape)} and teacher_hidden"
            f"{list(teacher_hidden.shape)} must agree on all but the width; "
            "shift both to completion coordinates first"
        )
    return vocab
