"""Per-token divergences between a student and its teacher, and their mean.

Every piece returns one number a token, ``[...]``; :func:`weighted_mean` alone
reduces. Direction and space are in the names: ``reverse_kl(student_logp,
teacher_logp)`` is KL(student || teacher) of log-probabilities ``[..., V]``, the
token loss of arXiv:2606.00305, §3; ``logits`` are raw.

Numbers (ours): sums run in float32 whatever the inputs, float64 where those
are. An impossible token has log-probability :data:`LOWEST` rather than -inf,
so that 0 * log 0 is 0 and no gradient is NaN. Where a distribution is divided
by, its log-probabilities are floored at ``log_floor``: p_T = 0 < p_S is truly
infinite and costs ``p_S * (log p_S - log_floor)`` here instead.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from topd_jax.parallel.collectives import top_k

# Stands for log 0. Far below any real log-probability, far above overflow.
LOWEST = -1e30
LOG_FLOOR = -100.0
# exp of this is still finite in float32, and so are sums of it.
_MAX_LOG_RATIO = 80.0

Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS = ("k1", "k2", "k3")


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float64 where any of the arrays is, float32 otherwise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _floored(x: jax.Array, floor: float = LOWEST) -> jax.Array:
    # where, not maximum: the gradient of a maximum splits ties by division.
    x = x.astype(accumulation_dtype(x))
    return jnp.where(x <= floor, floor, x)  # NaN stays NaN


def _normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    # log sum exp in two parts, to be taken off one after the other: added up,
    # a peak at LOWEST would swallow the logarithm.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True)
    return peak, jnp.log(total)


def _selected(values: jax.Array, tokens: jax.Array) -> jax.Array:
    # One-hot, not gather: gather would materialise log-softmax, and its
    # gradient is a scatter.
    tokens = jnp.asarray(tokens)
    ids = jax.lax.broadcasted_iota(tokens.dtype, values.shape, values.ndim - 1)
    return jnp.sum(jnp.where(ids == tokens[..., None], values, 0), axis=-1)


def log_softmax(logits: jax.Array) -> jax.Array:
    """log p(v) = logits_v - log sum_u exp(logits_u), finite for -inf (ours).

    Args:
      logits: [..., V] raw scores of any float type.

    Returns:
      f32[..., V] (f64 for f64). A logit of -inf gives about ``LOWEST`` and no
      gradient; a row that is -inf throughout is uniform.
    """
    logits = _floored(logits)
    peak, log_total = _normalizer(logits)
    return logits - peak - log_total


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(y) of one token a position, without a gather.

    Args:
      logits: [..., V] raw scores.
      tokens: i32[...] token ids; any id may stand where a mask hides it.

    Returns:
      f32[...] (f64 for f64).
    """
    logits = _floored(logits)
    peak, log_total = _normalizer(logits)
    return _selected(logits, tokens) - peak[..., 0] - log_total[..., 0]


def cross_entropy(
    logp: jax.Array, tokens: jax.Array, *, log_floor: float = LOG_FLOOR
) -> jax.Array:
    """-log p(y), at most ``-log_floor``.

    Args:
      logp: [..., V] log-probabilities.
      tokens: i32[...] token ids.
      log_floor: stands for smaller log-probabilities.

    Returns:
      f32[...] (f64 for f64), 0..-log_floor.
    """
    return -_selected(_floored(logp, log_floor), tokens)


def entropy(logp: jax.Array) -> jax.Array:
    """H(p) = -sum_v p_v log p_v.

    Args:
      logp: [..., V] log-probabilities.

    Returns:
      f32[...] (f64 for f64), 0..log V.
    """
    logp = _floored(logp)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def reverse_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T).

    The token loss l_t of arXiv:2606.00305, §3; beta 1 of the generalised JSD.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      log_floor: stands for smaller log-probabilities of the teacher (ours).

    Returns:
      f32[...] (f64 for f64).
    """
    student = _floored(student_logp)
    teacher = _floored(teacher_logp, log_floor)
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def forward_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S).

    The distillation term of the warm start, arXiv:2606.00305, App. B; beta 0
    of the generalised JSD.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      log_floor: stands for smaller log-probabilities of the student (ours).

    Returns:
      f32[...] (f64 for f64).
    """
    return reverse_kl(teacher_logp, student_logp, log_floor=log_floor)


def generalized_jsd(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    beta: float,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.

    The generalised Jensen-Shannon divergence of GKD, arXiv:2306.13649, §3.
    The formula tends to 0 at both ends; there beta = 0 means
    :func:`forward_kl` and beta = 1 :func:`reverse_kl`. No temperature factor.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      beta: a Python number, 0..1.
      log_floor: as in the two KLs at the ends; M needs no floor.

    Returns:
      f32[...] (f64 for f64).

    Raises:
      ValueError: for a beta outside 0..1.
    """
    checked_beta(beta)
    if beta == 0:
        return forward_kl(student_logp, teacher_logp, log_floor=log_floor)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp, log_floor=log_floor)
    student, teacher = _floored(student_logp), _floored(teacher_logp)
    p_student = (1 - beta) * jnp.exp(student)
    p_teacher = beta * jnp.exp(teacher)
    mixture = p_student + p_teacher
    tiny = jnp.finfo(mixture.dtype).tiny
    log_mixture = jnp.log(jnp.where(mixture > tiny, mixture, tiny))
    return jnp.sum(
        p_teacher * (teacher - log_mixture)
        + p_student * (student - log_mixture),
        axis=-1,
    )


def checked_beta(beta: float) -> float:
    """Returns beta, or raises a ValueError where it is outside 0..1."""
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta={beta} must lie in 0..1; 0 is forward KL, 1 reverse KL"
        )
    return beta


def top_k_reverse_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    k: int,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Reverse KL over the student's k likeliest tokens and one tail bin (ours).

    Both distributions are coarsened to k tokens and "all others", so this is
    a KL of its own: never negative, at most :func:`reverse_kl`, and equal to
    it at k >= V - 1. Tokens that tie with the k-th are kept as well.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      k: tokens kept, at least 1.
      log_floor: stands for smaller log-probabilities of the teacher.

    Returns:
      f32[...] (f64 for f64).

    Raises:
      ValueError: for k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1; k=1 keeps the argmax")
    student, teacher = _floored(student_logp), _floored(teacher_logp)
    k = min(k, student.shape[-1])
    kept = top_k(student, k)[0][..., -1:]
    inside = student >= kept
    head = jnp.where(
        inside, jnp.exp(student) * (student - _floored(teacher, log_floor)), 0
    )
    student_tail = sum(_normalizer(jnp.where(inside, LOWEST, student)))
    teacher_tail = sum(_normalizer(jnp.where(inside, LOWEST, teacher)))
    tail = jnp.exp(student_tail) * (
        student_tail - _floored(teacher_tail, log_floor)
    )
    return jnp.sum(head, axis=-1) + tail[..., 0]


def sampled_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    estimator: Estimator,
    *,
    direct_loss: bool = False,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Estimates KL(student || teacher) from tokens the student sampled.

    With r = log p_T(y) - log p_S(y) (Schulman, "Approximating KL divergence",
    2020): k1 = -r, unbiased, for metrics and as a policy-gradient reward, and
    returned stopped; k2 = r^2 / 2, biased, whose direct gradient is that of
    reverse KL in expectation; k3 = exp(r) - 1 - r, unbiased and never
    negative, whose *direct* gradient is in expectation that of **forward**
    KL, not of the reverse KL that it estimates.

    Args:
      student_logp: [...] log p_S of the sampled tokens.
      teacher_logp: [...] log p_T of the same tokens.
      estimator: "k1", "k2" or "k3".
      direct_loss: the caller will differentiate the result as a loss.
      log_floor: stands for smaller log-probabilities of either (ours); r in
        k3's exponential is capped at 80, where float32 ends.

    Returns:
      f32[...] (f64 for f64).

    Raises:
      ValueError: for an unknown estimator, and for k1 as a direct loss.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator={estimator!r} is unknown; choose one of "
            f"{', '.join(ESTIMATORS)}"
        )
    if direct_loss and estimator == "k1":
        raise ValueError(
            "estimator='k1' cannot be a direct loss: its expected gradient is "
            "zero, it would train on noise; use 'k2' (gradient of reverse "
            "KL), 'k3' (of forward KL), or the exact reverse_kl"
        )
    student = _floored(student_logp, log_floor)
    log_ratio = _floored(teacher_logp, log_floor) - student
    if estimator == "k1":
        return jax.lax.stop_gradient(-log_ratio)
    if estimator == "k2":
        return log_ratio**2 / 2
    return jnp.expm1(jnp.minimum(log_ratio, _MAX_LOG_RATIO)) - log_ratio


def weighted_mean(
    values: jax.Array,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """sum(mask * weights * values) / sum(mask); 0 where nothing counts.

    The weights stay out of the denominator: to count a token for less must
    not make the others count for more (arXiv:2606.00305, §5.1; ours).

    Args:
      values: [...] one value a token; NaN or inf outside the mask is ignored.
      weights: f32[...] how much each counts; 1 unless given. Broadcasts.
      mask: bool[...] which exist; all unless given. Broadcasts.

    Returns:
      f32[] (f64 for f64).

    Raises:
      ValueError: for a mask that is not bool.
    """
    values = values.astype(accumulation_dtype(values))
    mask = jnp.asarray(True if mask is None else mask)
    if mask.dtype != bool:
        raise ValueError(
            f"mask is {mask.dtype} and must be bool; pass numbers as weights, "
            "or mask=x > 0"
        )
    mask = jnp.broadcast_to(mask, values.shape)
    # Selected before they are multiplied: 0 * NaN would be NaN.
    total = jnp.where(mask, values, 0)
    if weights is not None:
        total = total * jnp.where(mask, weights.astype(values.dtype), 0)
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(total) / jnp.maximum(count, 1)
