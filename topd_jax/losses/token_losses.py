"""What a token loss is, and those of sibling papers.

The paper has none of these. Each takes both models' log-probabilities, as
:func:`~topd_jax.losses.divergences.reverse_kl` does, and can stand in its
place in an objective. Their weights are in
:mod:`topd_jax.losses.token_weights`.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from topd_jax.losses.divergences import forward_kl, reverse_kl, top_k_mask
from topd_jax.losses.log_probs import (
    LOG_FLOOR,
    LOWEST,
    check_log_floor,
    check_pair,
    entropy,
    floored,
    is_finite_number,
    token_logprobs,
)


class TokenLoss(Protocol):
    """Define a loss of one token from both models' distributions.

    Any function (student_logp [R, V], teacher_logp [R, V]) -> [R], for any
    number R of tokens. What else it needs of each token it names as further
    parameters: ``tokens`` i32[R], ``uniforms`` f32[R].
    """

    def __call__(
        self, student_logp: jax.Array, teacher_logp: jax.Array, **rows: Any
    ) -> jax.Array:
        """Return f32[R]."""


def top_k_forward_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    k: int,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Compute the KL of the teacher's top k tokens to the student.

    ``sum_{v in top-k} q_v (log q_v - log p_S(v))``, q = p_T renormalized over
    its top k; a KL, never negative. Tokens that tie with the k-th count.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      k: tokens kept, at least 1.
      log_floor: stands for smaller log-probabilities of the student.

    Returns:
      f32[...] (f64 for f64), nats.

    Raises:
      ValueError: for k below 1, or a floor of 0 or more.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.25, 0.5]))
      >>> round(float(top_k_forward_kl(student, teacher, 1)), 4)
      1.6094
    """
    check_pair(student_logp, teacher_logp)
    check_log_floor(log_floor)
    kept = top_k_mask(teacher_logp, k)
    teacher = jnp.where(kept, floored(teacher_logp), LOWEST)
    q = jax.nn.softmax(teacher, axis=-1)
    used = q > 0
    gap = jnp.log(jnp.where(used, q, 1.0)) - floored(student_logp, log_floor)
    return jnp.sum(jnp.where(used, q * gap, 0.0), axis=-1)


def clipped_reverse_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    clip: float = 0.05,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Compute KL(student || teacher) with each id's term at most ``clip``.

    ``sum_v min(p_S(v) (log p_S(v) - log p_T(v)), c)``, as OPSD clips its
    divergence (arXiv:2601.18734): where the teacher sees more, a few tokens
    would carry the whole gradient. A term that is cut has none.

    Args:
      student_logp: [..., V] log-probabilities, differentiated.
      teacher_logp: [..., V] log-probabilities.
      clip: c, above 0 nats. Terms below 0 stay, so the sum may be negative.
      log_floor: stands for smaller log-probabilities of the teacher.

    Returns:
      f32[...] (f64 for f64) token loss, nats.

    Raises:
      ValueError: for an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.9, 0.1]))
      >>> teacher = jnp.log(jnp.array([0.1, 0.9]))
      >>> round(float(clipped_reverse_kl(student, teacher, clip=0.5)), 4)
      0.2803
    """
    check_pair(student_logp, teacher_logp)
    check_log_floor(log_floor)
    if not (is_finite_number(clip) and clip > 0):
        raise ValueError(
            f"clip={clip!r} must be a finite number above 0 nats; the default: "
            "0.05"
        )
    student = floored(student_logp)
    terms = jnp.exp(student) * (student - floored(teacher_logp, log_floor))
    return jnp.sum(jnp.minimum(terms, clip), axis=-1)


def clipped_forward_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    clip: float = 0.05,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Compute KL(teacher || student) with each id's term at most ``clip``.

    ``sum_v min(p_T(v) (log p_T(v) - log p_S(v)), c)``: the other direction of
    :func:`clipped_reverse_kl`. Here the terms are large where the teacher is
    sure of an id that the student finds unlikely. None of those teaches, and
    the other ids of the softmax push them down: no force holds them.

    Args:
      student_logp: [..., V] log-probabilities, differentiated.
      teacher_logp: [..., V] log-probabilities.
      clip: as in :func:`clipped_reverse_kl`.
      log_floor: stands for smaller log-probabilities of the student.

    Returns:
      f32[...] (f64 for f64) token loss, nats.

    Raises:
      ValueError: for an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.9, 0.1]))
      >>> teacher = jnp.log(jnp.array([0.1, 0.9]))
      >>> round(float(clipped_forward_kl(student, teacher, clip=0.5)), 4)
      0.2803
    """
    return clipped_reverse_kl(
        teacher_logp, student_logp, clip=clip, log_floor=log_floor
    )


def top_k_coverage(
    student_logp: jax.Array, teacher_logp: jax.Array, k: int
) -> jax.Array:
    """Compute the teacher's mass on the student's top k tokens.

    C of TA-OPD (arXiv:2605.26844), and a metric of its own.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      k: tokens, at least 1; tokens that tie with the k-th count.

    Returns:
      f32[...], 0..1.

    Raises:
      ValueError: for k below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.25, 0.5]))
      >>> float(top_k_coverage(student, teacher, 1))
      0.25
    """
    check_pair(student_logp, teacher_logp)
    kept = top_k_mask(student_logp, k)
    mass = jnp.exp(teacher_logp.astype(jnp.float32))
    return jnp.sum(jnp.where(kept, mass, 0.0), axis=-1)


def entropy_aware_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    top_k: int = 16,
    alpha: float = 1.0,
    entropy_threshold: float = 0.8,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Add forward KL where the teacher is undecided (arXiv:2603.07079).

    ``KL(p_S || p_T) + alpha 1[H(p_T) > tau] KL(p_T on its top k || p_S)``.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      top_k: k, at least 1 (16 in the paper).
      alpha: weight of the added term, at least 0.
      entropy_threshold: tau, at least 0 nats.
      log_floor: stands for smaller log-probabilities of what is divided by.

    Returns:
      f32[...] token loss, nats.

    Raises:
      ValueError: for an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.25, 0.5]))
      >>> round(float(entropy_aware_kl(student, teacher, top_k=1)), 4)
      1.8274
    """
    _check_at_least_0("alpha", alpha, "; the paper's: 1")
    _check_at_least_0(
        "entropy_threshold", entropy_threshold, " nats; the paper's: 0.8"
    )
    undecided = entropy(teacher_logp) > entropy_threshold
    added = top_k_forward_kl(
        student_logp, teacher_logp, top_k, log_floor=log_floor
    )
    loss = reverse_kl(student_logp, teacher_logp, log_floor=log_floor)
    return loss + alpha * jnp.where(undecided, added, 0.0)


def trust_region_loss(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    tokens: jax.Array,
    uniforms: jax.Array,
    *,
    top_k: int = 16,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Compute a policy gradient in a trust region, forward KL outside it.

    arXiv:2606.01249: ``-M stop(A) log p_S(y) + (1 - M) KL(p_T on its top k ||
    p_S)``, ``A = log p_T(y) - log p_S(y)``, ``M ~ Bernoulli(min(exp A, 1))``.

    Args:
      student_logp: [..., V] log-probabilities, differentiated.
      teacher_logp: [..., V] log-probabilities.
      tokens: i32[...] the tokens y that the student sampled.
      uniforms: f32[...] uniform draws in 0..1, which decide M; data, so that
        a batch may be worked through in slices.
      top_k: k, at least 1.
      log_floor: stands for smaller log-probabilities of either.

    Returns:
      f32[...] token loss, nats.

    Raises:
      ValueError: for an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.25, 0.5]))
      >>> token, draw = jnp.array(2), jnp.array(0.9)
      >>> loss = trust_region_loss(student, teacher, token, draw, top_k=1)
      >>> round(float(loss), 4)
      1.4747
    """
    check_log_floor(log_floor)
    student, teacher = (
        jnp.maximum(token_logprobs(logp, tokens), log_floor)
        for logp in (student_logp, teacher_logp)
    )
    outside = top_k_forward_kl(
        student_logp, teacher_logp, top_k, log_floor=log_floor
    )
    advantage = jax.lax.stop_gradient(teacher - student)
    inside = uniforms < jnp.exp(jnp.minimum(advantage, 0.0))
    return jnp.where(inside, -advantage * student, outside)


def forward_kl_at_high_loss(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    tokens: jax.Array,
    *,
    loss_threshold: float = 1.0,
    alpha: float = 1.0,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Add forward KL at the tokens that the teacher would not have written.

    ``KL(p_S || p_T) + alpha 1[-log p_T(y) > tau] KL(p_T || p_S)``: where the
    student is sure of an error, reverse KL hardly moves the right token and
    forward KL does. It looks at no future, and the paper has no such loss.

    Args:
      student_logp: [..., V] log-probabilities, differentiated.
      teacher_logp: [..., V] log-probabilities.
      tokens: i32[...] the tokens y that the student sampled.
      loss_threshold: tau, at least 0 nats.
      alpha: weight of the added term, at least 0.
      log_floor: stands for smaller log-probabilities of what is divided by.

    Returns:
      f32[...] token loss, nats.

    Raises:
      ValueError: for an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.9, 0.1]))
      >>> teacher = jnp.log(jnp.array([0.1, 0.9]))
      >>> for token in jnp.array([0, 1]):
      ...     loss = forward_kl_at_high_loss(student, teacher, token)
      ...     print(round(float(loss), 4))
      3.5156
      1.7578
    """
    _check_at_least_0("alpha", alpha, "; the default: 1")
    _check_at_least_0("loss_threshold", loss_threshold, " nats; the default: 1")
    wrong = -token_logprobs(teacher_logp, tokens) > loss_threshold
    added = forward_kl(student_logp, teacher_logp, log_floor=log_floor)
    loss = reverse_kl(student_logp, teacher_logp, log_floor=log_floor)
    return loss + alpha * jnp.where(wrong, added, 0.0)


def suppress_unlikely(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    tokens: jax.Array,
    *,
    probability: float = 0.3,
) -> jax.Array:
    """Give every token that the student found unlikely one advantage of -1.

    ``1[p_S(y) < tau] log p_S(y)``, a policy gradient that asks no teacher: the
    control of arXiv:2608.31046, which finds that distillation on policy works
    largely by suppressing tokens of low probability.

    Args:
      student_logp: [..., V] log-probabilities, differentiated.
      teacher_logp: [..., V] ignored.
      tokens: i32[...] the tokens y that the student sampled.
      probability: tau, above 0 and at most 1.

    Returns:
      f32[...] token loss, nats.

    Raises:
      ValueError: for a probability out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]]))
      >>> loss = suppress_unlikely(student, student, jnp.array([0, 1]))
      >>> [round(float(x), 4) for x in loss]
      [0.0, -2.3026]
    """
    check_pair(student_logp, teacher_logp)
    if not (is_finite_number(probability) and 0 < probability <= 1):
        raise ValueError(
            f"probability={probability!r} must lie above 0 and at most 1; "
            "the default: 0.3"
        )
    own = token_logprobs(student_logp, tokens)
    unlikely = jax.lax.stop_gradient(own) < jnp.log(probability)
    return jnp.where(unlikely, own, 0.0)


def _check_at_least_0(name: str, value: float, usual: str) -> None:
    if not (is_finite_number(value) and value >= 0):
        raise ValueError(
            f"{name}={value!r} must be a finite number, at least 0{usual}"
        )
