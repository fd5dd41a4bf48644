"""Sibling methods of on-policy distillation, as pieces to compose.

Each piece is a function of statistics that the training step has already
computed, and returns weights ``f32[..., T]`` or a token loss ``f32[..., T]``:

    weighted_mean(token_loss, tip_weights(entropy, token_loss, mask,
                                          fraction=0.5), mask)

``A_t = log p_T(y_t) - log p_S(y_t)`` throughout. Weights are stopped and 0
outside the mask. Where a paper's recipe needs a choice that its one-line form
leaves open, the docstring says what is ours.
"""

import jax
import jax.numpy as jnp

from topd_jax.losses.divergences import LOG_FLOOR, LOWEST
from topd_jax.losses.near_future import masked_quantile
from topd_jax.parallel.collectives import top_k


def top_k_forward_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    k: int,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """KL of the teacher's k likeliest tokens, renormalised, to the student.

    ``sum_{v in top-k} q_v (log q_v - log p_S(v))``, q = p_T renormalised over
    its top k (ours); a KL, never negative. Tokens that tie with the k-th count.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      k: tokens kept, at least 1.
      log_floor: stands for smaller log-probabilities of the student (ours).

    Returns:
      f32[...].

    Raises:
      ValueError: for k below 1.
    """
    kept = _top_k(teacher_logp, k)
    teacher = jnp.maximum(teacher_logp.astype(jnp.float32), LOWEST)
    q = jax.nn.softmax(jnp.where(kept, teacher, LOWEST), axis=-1)
    used = q > 0
    student = student_logp.astype(jnp.float32)
    student = jnp.where(student <= log_floor, log_floor, student)
    gap = jnp.log(jnp.where(used, q, 1.0)) - student
    return jnp.sum(jnp.where(used, q * gap, 0.0), axis=-1)


def top_k_coverage(
    student_logp: jax.Array, teacher_logp: jax.Array, k: int
) -> jax.Array:
    """The teacher's mass on the student's k likeliest tokens.

    C of TA-OPD (arXiv:2605.26844), and a metric of its own.

    Args:
      student_logp: [..., V] log-probabilities.
      teacher_logp: [..., V] log-probabilities.
      k: tokens, at least 1; tokens that tie with the k-th count.

    Returns:
      f32[...], 0..1.

    Raises:
      ValueError: for k below 1.
    """
    kept = _top_k(student_logp, k)
    mass = jnp.exp(teacher_logp.astype(jnp.float32))
    return jnp.sum(jnp.where(kept, mass, 0.0), axis=-1)


def _top_k(logp: jax.Array, k: int) -> jax.Array:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1; k=1 keeps the argmax")
    logp = jax.lax.stop_gradient(logp)
    return logp >= top_k(logp, min(k, logp.shape[-1]))[0][..., -1:]


def entropy_aware_loss(
    token_loss: jax.Array,
    top_k_loss: jax.Array,
    teacher_entropy: jax.Array,
    *,
    alpha: float = 1.0,
    entropy_threshold: float = 0.8,
) -> jax.Array:
    """Forward KL added where the teacher is undecided (arXiv:2603.07079).

    ``l_t + alpha 1[H(p_T) > tau] KL(p_T on its top k || p_S)``.

    Args:
      token_loss: f32[..., T] reverse KL.
      top_k_loss: f32[..., T] :func:`top_k_forward_kl`, k = 16 in the paper.
      teacher_entropy: f32[..., T] nats.
      alpha: weight of the added term.
      entropy_threshold: tau, nats.

    Returns:
      f32[..., T] token loss, differentiable in the first two.
    """
    undecided = teacher_entropy > entropy_threshold
    return token_loss + alpha * jnp.where(undecided, top_k_loss, 0.0)


def trust_region_loss(
    lots: jax.Array,
    student_token_logp: jax.Array,
    teacher_token_logp: jax.Array,
    top_k_loss: jax.Array,
    *,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """Policy gradient inside a trust region, forward KL outside it.

    arXiv:2606.01249: ``-M stop(A) log p_S(y) + (1 - M) KL(p_T on its top k ||
    p_S)``, ``M ~ Bernoulli(min(p_T(y) / p_S(y), 1))``.

    Args:
      lots: f32[..., T] uniform draws in 0..1, which decide M; data, so that a
        batch may be worked through in slices.
      student_token_logp: f32[..., T] log p_S(y_t), differentiated.
      teacher_token_logp: f32[..., T] log p_T(y_t).
      top_k_loss: f32[..., T] :func:`top_k_forward_kl`.
      log_floor: stands for smaller log-probabilities of either (ours).

    Returns:
      f32[..., T] token loss.
    """
    student = jnp.maximum(student_token_logp, log_floor)
    teacher = jnp.maximum(teacher_token_logp, log_floor)
    advantage = jax.lax.stop_gradient(teacher - student)
    inside = lots < jnp.exp(jnp.minimum(advantage, 0.0))
    return jnp.where(inside, -advantage * student, top_k_loss)


def tip_weights(
    student_entropy: jax.Array,
    token_loss: jax.Array,
    mask: jax.Array,
    *,
    fraction: float,
) -> jax.Array:
    """Keeps the most important tokens (TIP, arXiv:2604.14084).

    The top fraction by ``H + D - H D``, student entropy H and divergence D
    each divided by its maximum over the batch (the normaliser is ours).

    Args:
      student_entropy: f32[..., T] nats.
      token_loss: f32[..., T] divergence of student and teacher.
      mask: bool[..., T] which tokens exist.
      fraction: share of the batch's tokens to keep, 0..1; ties with the last
        one are kept too.

    Returns:
      f32[..., T] 1 where kept, else 0. The mean over the kept tokens alone is
      ``weighted_mean(loss, mask=weights > 0)``.

    Raises:
      ValueError: for a fraction outside (0, 1].
    """
    entropy = student_entropy / _largest(student_entropy, mask)
    divergence = token_loss / _largest(token_loss, mask)
    score = entropy + divergence - entropy * divergence
    return _keep_top(score, mask, fraction)


def teachability_weights(
    token_loss: jax.Array,
    coverage: jax.Array,
    mask: jax.Array,
    *,
    fraction: float,
) -> jax.Array:
    """Keeps the tokens that can be taught (TA-OPD, arXiv:2605.26844).

    The top fraction of the batch by ``D C``: the two disagree, yet the
    teacher's choice is within the student's reach.

    Args:
      token_loss: f32[..., T] divergence D.
      coverage: f32[..., T] C, see :func:`top_k_coverage`.
      mask: bool[..., T] which tokens exist.
      fraction: as in :func:`tip_weights`.

    Returns:
      f32[..., T] 1 where kept, else 0.

    Raises:
      ValueError: for a fraction outside (0, 1].
    """
    return _keep_top(token_loss * coverage, mask, fraction)


def _largest(values: jax.Array, mask: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.where(mask, values, 0.0))
    return jnp.where(largest > 0, largest, 1.0)


def _keep_top(score: jax.Array, mask: jax.Array, fraction: float) -> jax.Array:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} must lie above 0 and at most 1, which keeps "
            "every token"
        )
    ordered = -jnp.sort(-jnp.where(mask, score, -jnp.inf).ravel())
    # The slack keeps float32 from rounding 0.07 * 100 up to 8.
    count = jnp.ceil(fraction * mask.sum() - 1e-4).astype(jnp.int32)
    last = ordered[jnp.maximum(count - 1, 0)]
    kept = (mask & (score >= last)).astype(jnp.float32)
    return jax.lax.stop_gradient(kept)


def fire_weights(
    teacher_token_logp: jax.Array,
    student_entropy: jax.Array,
    teacher_entropy: jax.Array,
    mask: jax.Array,
    *,
    drop: float = 0.2,
) -> jax.Array:
    """Drops poor rollouts, weighs the rest by confidence (arXiv:2606.02684).

    FiRe-OPD: the worst ``drop`` of the rollouts by mean log p_T(y) get weight
    0, the others ``(2 - H_T / max H_T)(1 + H_S / max H_S)``, scaled to mean 1.
    Ours: the maxima run over the batch, the number dropped is rounded down,
    and the mean of 1 is over all tokens that exist, dropped ones included, so
    that ``weighted_mean(loss, weights, mask)`` is a true average.

    Args:
      teacher_token_logp: f32[..., T] log p_T(y_t).
      student_entropy: f32[..., T] nats.
      teacher_entropy: f32[..., T] nats.
      mask: bool[..., T] which tokens exist; each row is a rollout.
      drop: share of the rollouts, 0..1.

    Returns:
      f32[..., T], stopped.

    Raises:
      ValueError: for a share outside 0..1.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop} must lie in 0..1; 0 keeps every rollout")
    length = mask.sum(axis=-1)
    total = jnp.where(mask, teacher_token_logp, 0.0).sum(axis=-1)
    mean = jnp.where(length > 0, total / jnp.maximum(length, 1), jnp.inf)
    rank = jnp.argsort(jnp.argsort(mean.ravel())).reshape(mean.shape)
    dropped = jnp.floor(drop * jnp.sum(length > 0) + 1e-4)
    kept = mask & (rank >= dropped)[..., None]
    weights = (2 - teacher_entropy / _largest(teacher_entropy, mask)) * (
        1 + student_entropy / _largest(student_entropy, mask)
    )
    weights = jnp.where(kept, weights, 0.0)
    total = jnp.sum(weights)
    scale = mask.sum() / jnp.where(total > 0, total, 1.0)
    return jax.lax.stop_gradient(weights * scale)


def agreement_threshold(
    token_loss: jax.Array,
    mask: jax.Array,
    *,
    quantile: float = 0.1,
    window: int = 64,
) -> jax.Array:
    """The batch's quantile of the running mean of the token loss.

    What :func:`agreement_weights` compares with (KAT, arXiv:2606.09471). The
    paper's quantile moves with training: keep an average over steps, e.g.
    ``optax.incremental_update``. The default level is ours.

    Args:
      token_loss: f32[..., T] reverse KL.
      mask: bool[..., T] which tokens exist.
      quantile: 0..1.
      window: tokens of the running mean.

    Returns:
      f32[], stopped; +inf where no row is as long as the window.
    """
    mean, full = _running_mean(token_loss, mask, window)
    level = masked_quantile(mean.ravel(), full.ravel(), quantile)
    return jax.lax.stop_gradient(level)


def agreement_weights(
    token_loss: jax.Array,
    mask: jax.Array,
    threshold: jax.Array | float,
    *,
    window: int = 64,
) -> jax.Array:
    """Cuts rollouts where student and teacher agree for too long.

    KAT, arXiv:2606.09471: a student that repeats itself carries the teacher
    with it; the divergence stays low and teaches nothing. The rollout is cut
    after the first token at which the mean over the ``window`` tokens up to it
    is below the threshold, as an online rule would (ours).

    Args:
      token_loss: f32[..., T] reverse KL.
      mask: bool[..., T] which tokens exist, padded on the right.
      threshold: f32[], see :func:`agreement_threshold`.
      window: tokens of the running mean; shorter rows are never cut.

    Returns:
      f32[..., T] 1 up to the cut, 0 after it.
    """
    mean, full = _running_mean(token_loss, mask, window)
    trapped = (full & (mean < threshold)).astype(jnp.int32)
    before = jnp.cumsum(trapped, axis=-1) - trapped
    return (mask & (before == 0)).astype(jnp.float32)


def _running_mean(
    values: jax.Array, mask: jax.Array, window: int
) -> tuple[jax.Array, jax.Array]:
    """Mean of the last ``window`` tokens, and where there are as many."""
    if window < 1:
        raise ValueError(f"window={window} must be at least 1; the paper's: 64")
    shape = (1,) * (values.ndim - 1) + (window,)
    pad = [(0, 0)] * (values.ndim - 1) + [(window - 1, 0)]

    # Not a difference of cumulative sums: over a long row it would drown the
    # small means that are looked for.
    def total(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(
            x, 0.0, jax.lax.add, shape, (1,) * x.ndim, pad
        )

    count = total(mask.astype(jnp.float32))
    mean = total(jnp.where(mask, values, 0.0).astype(jnp.float32)) / window
    return mean, mask & (count == window)


def prefix_weights(
    student_token_logp: jax.Array,
    teacher_token_logp: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 0.5,
    log_floor: float = LOG_FLOOR,
) -> jax.Array:
    """More weight before the disagreement has piled up (arXiv:2606.22600).

    IW-OPD: ``w_t = 1 + gamma (1 - sum_{k < t} |A_k| / sum_k |A_k|)``, sums over
    the row.

    Args:
      student_token_logp: f32[..., T] log p_S(y_t).
      teacher_token_logp: f32[..., T] log p_T(y_t).
      mask: bool[..., T] which tokens exist.
      gamma: weight of the first token, less 1.
      log_floor: stands for smaller log-probabilities of either (ours).

    Returns:
      f32[..., T] 1..1 + gamma, 0 outside the mask, stopped. Where a row holds
      no disagreement, 1 + gamma throughout.
    """
    gap = jnp.maximum(teacher_token_logp, log_floor) - jnp.maximum(
        student_token_logp, log_floor
    )
    gap = jnp.where(mask, jnp.abs(gap), 0.0)
    total = gap.sum(axis=-1, keepdims=True)
    before = jnp.cumsum(gap, axis=-1) - gap
    share = before / jnp.where(total > 0, total, 1.0)
    weights = jnp.where(mask, 1 + gamma * (1 - share), 0.0)
    return jax.lax.stop_gradient(weights)
