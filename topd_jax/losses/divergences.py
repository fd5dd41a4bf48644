"""Per-token divergences between a student and its teacher, and their mean.

Every piece returns one number a token, ``[...]``; :func:`weighted_mean` alone
reduces. Direction and space are in the names: ``reverse_kl(student_logp,
teacher_logp)`` is KL(student || teacher) of log-probabilities ``[..., V]``, the
token loss of arXiv:2606.00305, §3; ``logits`` are raw, and
:func:`on_logits` takes them with a temperature.

Where a distribution is divided by, its log-probabilities are floored at
``log_floor``: p_T = 0 < p_S is truly infinite and costs
``p_S * (log p_S - log_floor)`` here instead. The paper has no floors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from topd_jax.losses.log_probs import (
    LOG_FLOOR,
    accumulation_dtype,
    check_log_floor,
    check_pair,
    floored,
    is_finite_number,
    log_softmax,
    within,
)

# Blocks of the vocabulary in which the largest values are found first.
_BLOCKS = 16

# (student_logp [..., V], teacher_logp [..., V]) -> [...]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def reverse_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    log_floor: float = LOG_FLOOR,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Compute KL(student || teacher) = sum_v p_S (log p_S - log p_T).

    The token loss l_t of arXiv:2606.00305, §3; beta 1 of the generalized JSD.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      log_floor: stands for smaller log-probabilities of the teacher, below 0.
      axis: of the vocabulary.
      where: bool, broadcast to the inputs: the ids that the sum runs over;
        all unless given. What the others hold, NaN too, is ignored.

    Returns:
      f32[...] (f64 for f64), nats.

    Raises:
      ValueError: for shapes that differ or a floor of 0 or more.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.5]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(reverse_kl(student, teacher)), 4)
      0.1438

    See also:
      :func:`forward_kl`, :func:`generalized_jsd`; without logits in memory
      :func:`topd_jax.losses.fused.fused_divergence`.
    """
    check_pair(student_logp, teacher_logp)
    check_log_floor(log_floor)
    student = within(floored(student_logp), where)
    teacher = within(floored(teacher_logp, log_floor), where)
    return jnp.sum(
        jnp.exp(student) * (student - teacher), axis=axis, where=where
    )


def forward_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    *,
    log_floor: float = LOG_FLOOR,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Compute KL(teacher || student) = sum_v p_T (log p_T - log p_S).

    The distillation term of the warm start, arXiv:2606.00305, App. B; beta 0
    of the generalized JSD.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      log_floor: stands for smaller log-probabilities of the student, below 0.
      axis: of the vocabulary.
      where: as in :func:`reverse_kl`.

    Returns:
      f32[...] (f64 for f64), nats.

    Raises:
      ValueError: as :func:`reverse_kl`.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.5]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(forward_kl(student, teacher)), 4)
      0.1308
    """
    return reverse_kl(
        teacher_logp, student_logp, log_floor=log_floor, axis=axis, where=where
    )


def generalized_jsd(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    beta: float = 0.5,
    *,
    log_floor: float = LOG_FLOOR,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Compute beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1-beta) S.

    The generalized Jensen-Shannon divergence of GKD, arXiv:2306.13649, §3.
    The formula tends to 0 at both ends; there beta = 0 means
    :func:`forward_kl` and beta = 1 :func:`reverse_kl`. No temperature factor.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      beta: a Python number, 0..1.
      log_floor: as in the two KLs at the ends; M needs no floor.
      axis: of the vocabulary.
      where: as in :func:`reverse_kl`.

    Returns:
      f32[...] (f64 for f64), nats.

    Raises:
      ValueError: for a beta outside 0..1, and as :func:`reverse_kl`.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.log(jnp.array([0.5, 0.5]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(generalized_jsd(student, teacher, 0.5)), 4)
      0.0338
    """
    if not (is_finite_number(beta) and 0 <= beta <= 1):
        raise ValueError(
            f"beta={beta!r} must lie in 0..1; 0 is forward KL, 1 reverse KL"
        )
    if beta in (0, 1):
        kl = forward_kl if beta == 0 else reverse_kl
        return kl(
            student_logp, teacher_logp,
            log_floor=log_floor, axis=axis, where=where,
        )  # fmt: skip
    check_pair(student_logp, teacher_logp)
    student = within(floored(student_logp), where)
    teacher = within(floored(teacher_logp), where)
    p_student = (1 - beta) * jnp.exp(student)
    p_teacher = beta * jnp.exp(teacher)
    mixture = p_student + p_teacher
    tiny = jnp.finfo(mixture.dtype).tiny
    log_mixture = jnp.log(jnp.where(mixture > tiny, mixture, tiny))
    return jnp.sum(
        p_teacher * (teacher - log_mixture)
        + p_student * (student - log_mixture),
        axis=axis,
        where=where,
    )


def on_logits(
    divergence: Divergence,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Compute a divergence of raw logits at a temperature.

    ``divergence(log softmax(z_S / tau), log softmax(z_T / tau))``, without the
    factor tau^2 of some implementations.

    Args:
      divergence: :func:`reverse_kl`, :func:`forward_kl`, or any function of
        two arrays of log-probabilities.
      student_logits: [..., V] raw scores.
      teacher_logits: [..., V] raw scores.
      temperature: tau, above 0.

    Returns:
      What ``divergence`` returns, f32[...].

    Raises:
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0])
      >>> round(float(on_logits(reverse_kl, *logits, temperature=2.0)), 4)
      0.2729
    """
    check_temperature(temperature)
    return divergence(
        log_softmax(student_logits / temperature),
        log_softmax(teacher_logits / temperature),
    )


def check_temperature(temperature: float | jax.Array) -> None:
    """Raise ValueError for a Python number that is not positive and finite."""
    if isinstance(temperature, int | float) and not 0 < temperature < 1e30:
        raise ValueError(
            f"temperature={temperature} must be positive and finite; 1 leaves "
            "the logits as they are"
        )


def top_k_mask(values: jax.Array, k: int) -> jax.Array:
    """Mark the k largest values of the last axis, and those tied with the k-th.

    The largest are found within blocks first, then among these: on a mesh the
    values stay on the devices that hold them.

    Args:
      values: [..., V]; not differentiated.
      k: at least 1; V and more marks everything.

    Returns:
      bool[..., V].

    Raises:
      ValueError: for k below 1.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(
            f"k={k!r} must be a whole number, at least 1; k=1 keeps the argmax"
        )
    values = jax.lax.stop_gradient(values)
    vocab = values.shape[-1]
    best = values
    if vocab % _BLOCKS == 0 and k < vocab // _BLOCKS:
        blocks = values.reshape(*values.shape[:-1], _BLOCKS, -1)
        best = jax.lax.top_k(blocks, k)[0]
        best = best.reshape(*values.shape[:-1], -1)
    return values >= jax.lax.top_k(best, min(k, vocab))[0][..., -1:]


def weighted_mean(
    values: jax.Array,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute sum(mask * weights * values) / sum(mask); 0 where nothing counts.

    The weights stay out of the denominator: to count a token for less must
    not make the others count for more (arXiv:2606.00305, §5.1).

    Args:
      values: [...] one value a token; NaN or inf outside the mask is ignored.
      weights: f32[...] how much each counts; 1 unless given. Broadcasts.
      mask: bool[...] which exist; all unless given. Broadcasts.

    Returns:
      f32[] (f64 for f64).

    Raises:
      ValueError: for a mask that is not bool, or weights that are.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = jnp.array([1.0, 2.0, 9.0])
      >>> weights = jnp.array([1.0, 0.5, 1.0])
      >>> mask = jnp.array([True, True, False])
      >>> float(weighted_mean(loss, weights, mask))
      1.0
    """
    values = values.astype(accumulation_dtype(values))
    mask = jnp.asarray(True if mask is None else mask)
    if mask.dtype != bool:
        raise ValueError(
            f"mask is {mask.dtype} and must be bool; pass numbers as weights, "
            "or mask=x > 0"
        )
    if weights is not None and weights.dtype == bool:
        raise ValueError(
            "weights are bool, and would leave what they hide in the "
            "denominator; pass a mask as mask=..."
        )
    mask = jnp.broadcast_to(mask, values.shape)
    # Selected before they are multiplied: 0 * NaN would be NaN.
    total = jnp.where(mask, values, 0)
    if weights is not None:
        total = total * jnp.where(mask, weights.astype(values.dtype), 0)
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(total) / jnp.maximum(count, 1)
