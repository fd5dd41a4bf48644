"""Weights of tokens: how much each one's loss counts.

Every function takes statistics of the tokens and returns ``f32[..., T]``, 0
outside the mask, stopped:

    weighted_mean(token_loss, tip_weights(entropy, token_loss, mask,
                                          fraction=0.5), mask)

The caps of arXiv:2606.00305, §5.1; n-step weights, which the paper does not
have; and the weights of sibling papers, ``A_t = log p_T(y_t) - log p_S(y_t)``
throughout. Their papers leave open the normalizer of :func:`tip_weights`, the
level of :func:`agreement_threshold` and the rounding of shares.
"""

import chex
import jax
import jax.numpy as jnp

from topd_jax.losses.log_probs import LOG_FLOOR, check_log_floor
from topd_jax.losses.near_future import masked_quantile
from topd_jax.types import Candidates


def scatter_to_tokens(
    candidates: Candidates, flags: jax.Array, length: int
) -> jax.Array:
    """Turn flags of candidates into flags of the tokens that they stand at.

    Args:
      candidates: [..., M].
      flags: bool[..., M].
      length: T.

    Returns:
      bool[..., T].
    """
    # A comparison, not a scatter; XLA fuses it into the reduction.
    at = candidates.positions[..., None] == jnp.arange(length)
    return jnp.any(at & (flags & candidates.mask)[..., None], axis=-2)


def median_cap_weights(
    token_loss: jax.Array, mask: jax.Array, selected: jax.Array
) -> jax.Array:
    """Cap selected tokens' loss at their row's median.

    ``w_t = median / l_t`` where t is selected and ``l_t > median``, else 1
    (arXiv:2606.00305, §5.1). A stopped weight: ``min(l_t, median)``
    would leave the capped token no gradient at all. Use it as
    ``weighted_mean(token_loss, weights, mask)``, whose denominator does not
    shrink with the weights.

    Args:
      token_loss: f32[..., T] the loss that is capped, not the score that
        candidates were ranked by.
      mask: bool[..., T] which tokens exist; the median is taken over them.
      selected: bool[..., T] which may be capped, see
        :func:`scatter_to_tokens`.

    Returns:
      f32[..., T], 0..1, stopped.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = jnp.array([4.0, 1.0, 2.0])
      >>> mask, selected = loss > 0, loss == 4
      >>> median_cap_weights(loss, mask, selected).tolist()
      [0.5, 1.0, 1.0]
    """
    chex.assert_type([mask, selected], bool)
    loss = jax.lax.stop_gradient(token_loss.astype(jnp.float32))
    median = masked_quantile(loss, mask, 0.5)[..., None]
    # KL of equal distributions may round to a little below 0.
    median = jnp.maximum(median, 0.0)
    capped = selected & mask & (loss > median)
    return jnp.where(capped, median / jnp.where(capped, loss, 1.0), 1.0)


def n_step_weights(
    divergent: jax.Array,
    candidates: Candidates,
    mask: jax.Array,
    *,
    n: int,
    discount: float = 1.0,
    strength: float = 1.0,
    cap: float = 1.0,
) -> jax.Array:
    """Give more weight to the n tokens from each divergent state on.

    Each divergent candidate at t adds ``discount**i`` to the bonus of token
    ``t + i``, i < n; ``w = mask * (1 + strength * min(bonus, cap))``. Guidance
    without a second context, by the token loss alone.

    Args:
      divergent: bool[..., M].
      candidates: [..., M].
      mask: bool[..., T] which tokens exist.
      n: tokens a bonus reaches, at least 1.
      discount: 0..1, of the bonus from one token to the next.
      strength: at least 0.
      cap: of the bonus where several overlap, at least 0.

    Returns:
      f32[..., T], 0 outside the mask, 1..1 + strength * cap inside.

    Raises:
      ValueError: for an argument out of bounds.
    """
    chex.assert_type([divergent, candidates.mask, mask], bool)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1, the divergent token")
    if not 0 <= discount <= 1:
        raise ValueError(
            f"discount={discount} must lie in 0..1; 1 weighs all n tokens alike"
        )
    if strength < 0 or cap < 0:
        raise ValueError(
            f"strength={strength} and cap={cap} must be at least 0; "
            "0 switches the bonus off"
        )
    starts = candidates.positions[..., None]
    step = jnp.arange(mask.shape[-1]) - starts
    reached = (step >= 0) & (step < n)
    reached &= (divergent & candidates.mask)[..., None]
    # Over M x T, fused into the sum: no table to gather from, no scatter.
    decay = jnp.power(jnp.float32(discount), jnp.clip(step, 0, n - 1))
    bonus = jnp.sum(jnp.where(reached, decay, 0.0), axis=-2)
    return mask * (1.0 + strength * jnp.minimum(bonus, cap))


def tip_weights(
    student_entropy: jax.Array,
    token_loss: jax.Array,
    mask: jax.Array,
    *,
    fraction: float,
) -> jax.Array:
    """Keep the most important tokens (TIP, arXiv:2604.14084).

    The top fraction by ``H + D - H D``, student entropy H and divergence D
    each divided by its maximum over the batch.

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
    chex.assert_type([mask], bool)
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
    """Keep the tokens that can be taught (TA-OPD, arXiv:2605.26844).

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
    chex.assert_type([mask], bool)
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
    """Drop poor rollouts, weigh the rest by confidence (arXiv:2606.02684).

    FiRe-OPD: the worst ``drop`` of the rollouts by mean log p_T(y) get weight
    0, the others ``(2 - H_T / max H_T)(1 + H_S / max H_S)``, scaled to mean 1.
    The maxima run over the batch, the number dropped is rounded down,
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
    chex.assert_type([mask], bool)
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
    """Compute the batch's quantile of the running mean of the token loss.

    What :func:`agreement_weights` compares with (KAT, arXiv:2606.09471). The
    paper's quantile moves with training: keep an average over steps, e.g.
    ``optax.incremental_update``.

    Args:
      token_loss: f32[..., T] reverse KL.
      mask: bool[..., T] which tokens exist.
      quantile: 0..1.
      window: tokens of the running mean.

    Returns:
      f32[], stopped; +inf where no row is as long as the window.
    """
    chex.assert_type([mask], bool)
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
    """Cut rollouts where student and teacher agree for too long.

    KAT, arXiv:2606.09471: a student that repeats itself carries the teacher
    with it; the divergence stays low and teaches nothing. The rollout is cut
    after the first token at which the mean over the ``window`` tokens up to it
    is below the threshold, as an online rule would.

    Args:
      token_loss: f32[..., T] reverse KL.
      mask: bool[..., T] which tokens exist, padded on the right.
      threshold: f32[], see :func:`agreement_threshold`.
      window: tokens of the running mean; shorter rows are never cut.

    Returns:
      f32[..., T] 1 up to the cut, 0 after it.
    """
    chex.assert_type([mask], bool)
    mean, full = _running_mean(token_loss, mask, window)
    trapped = (full & (mean < threshold)).astype(jnp.int32)
    before = jnp.cumsum(trapped, axis=-1) - trapped
    return (mask & (before == 0)).astype(jnp.float32)


def _running_mean(
    values: jax.Array, mask: jax.Array, window: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the mean of the last tokens, and where there are enough."""
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
    """Give more weight before the disagreement has piled up.

    IW-OPD (arXiv:2606.22600): ``w_t = 1 + gamma (1 - sum_{k < t} |A_k| / sum_k
    |A_k|)``, sums over the row.

    Args:
      student_token_logp: f32[..., T] log p_S(y_t).
      teacher_token_logp: f32[..., T] log p_T(y_t).
      mask: bool[..., T] which tokens exist.
      gamma: weight of the first token, less 1.
      log_floor: stands for smaller log-probabilities of either, below 0.

    Returns:
      f32[..., T] 1..1 + gamma, 0 outside the mask, stopped. Where a row holds
      no disagreement, 1 + gamma throughout.
    """
    chex.assert_type([mask], bool)
    check_log_floor(log_floor)
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be at least 0; the paper's: 0.5")
    gap = jnp.maximum(teacher_token_logp, log_floor) - jnp.maximum(
        student_token_logp, log_floor
    )
    gap = jnp.where(mask, jnp.abs(gap), 0.0)
    total = gap.sum(axis=-1, keepdims=True)
    before = jnp.cumsum(gap, axis=-1) - gap
    share = before / jnp.where(total > 0, total, 1.0)
    weights = jnp.where(mask, 1 + gamma * (1 - share), 0.0)
    return jax.lax.stop_gradient(weights)


def renormalized(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Scale weights so that they add up to the number of tokens.

    Where a method keeps some tokens only, the mean is over those it keeps.

    Args:
      weights: f32[..., T], 0 outside the mask.
      mask: bool[..., T] which tokens exist.

    Returns:
      f32[..., T]; 0 where all weights are.
    """
    total = jnp.sum(weights)
    return weights * jnp.sum(mask) / jnp.where(total > 0, total, 1.0)
