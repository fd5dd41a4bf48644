"""Where the futures part: candidates, windows, masks, and weights from them.

arXiv:2606.00305, §3. A high token loss says that student and teacher disagree
about one token, not that it matters: about 30 % of such disagreements lead to
the same future (§2.1). So the tokens of highest loss are only *candidates*;
from each, K tokens of student and teacher are compared by transport. A
candidate whose distance is high is *divergent*, the others are *false
alarms*, and weights of the token loss follow from the two masks: false alarms
are capped at the row's median (§5.1), or divergent states lend weight to the
tokens after them (ours).

Every function here is pure and free of gradient: masks, indices and weights
are data. All of them are written as comparisons, sorts and sums; scatters and
element-wise gathers are slow on accelerators.
"""

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.types import Candidates, Trajectories, Windows


def select_candidates(
    token_loss: jax.Array,
    mask: jax.Array,
    *,
    count: int,
    fraction: float | None = None,
) -> Candidates:
    """The ``count`` tokens of highest loss of each row.

    arXiv:2606.00305, §3 (top m by loss). With ``fraction``, a row of N tokens
    fills ``ceil(fraction * N)`` of its slots (ours: the paper's 218 of 9688 is
    one row's, and rows differ in length). Among equal losses the earlier token
    goes first. Never padding, and never a token whose loss is NaN or -inf.

    Args:
      token_loss: f32[..., T] score of each token, e.g. -log p_T(y_t).
      mask: bool[..., T] which tokens exist.
      count: M, slots a row, 1..T.
      fraction: share of a row's tokens to take, 0..1; None fills every slot.

    Returns:
      Candidates [..., M], positions ascending.

    Raises:
      ValueError: for a count outside 1..T or a fraction outside (0, 1].
    """
    length = token_loss.shape[-1]
    if not 1 <= count <= length:
        raise ValueError(
            f"count={count} must lie in 1..{length}, the completion's length; "
            f"try {min(max(count, 1), length)}"
        )
    _check_fraction(fraction)
    scores = jnp.where(mask & ~jnp.isnan(token_loss), token_loss, -jnp.inf)
    values, positions = jax.lax.top_k(scores, count)
    used = values > -jnp.inf
    if fraction is not None:
        # A table in double precision: in float32, 0.07 * 100 may exceed 7.
        quota = np.ceil(fraction * np.arange(length + 1) - 1e-9)
        allowed = jnp.asarray(quota, jnp.int32)[mask.sum(axis=-1)]
        used &= jnp.arange(count) < allowed[..., None]
    # Unused slots sort to the end.
    positions = jnp.sort(jnp.where(used, positions, length), axis=-1)
    used = positions < length
    return Candidates(jnp.where(used, positions, 0), used)


def _check_fraction(fraction: float | None) -> None:
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} must lie above 0 and at most 1; None fills "
            "every slot"
        )


def slice_windows(
    values: jax.Array, positions: jax.Array, length: int
) -> jax.Array:
    """``values[t : t + K]`` for each position t, zeros past the end.

    Args:
      values: [..., T] or [..., T, D].
      positions: i32[..., M] where each window starts, 0..T-1.
      length: K.

    Returns:
      [..., M, K] or [..., M, K, D].
    """

    def of_row(row: jax.Array, starts: jax.Array) -> jax.Array:
        row = jnp.pad(row, ((0, length),) + ((0, 0),) * (row.ndim - 1))
        # One gather of M slices, where indexing would gather M K elements.
        return jax.vmap(
            lambda start: jax.lax.dynamic_slice_in_dim(row, start, length)
        )(starts)

    for _ in range(positions.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(values, positions)


def student_windows(
    trajectories: Trajectories, candidates: Candidates, *, length: int
) -> Windows:
    """The rollout itself from each candidate on: ``y[t : t + K]``.

    Ours: the rollout is already a sample of the student at that prefix, costs
    nothing, and its contexts are in the training forward pass.

    Args:
      trajectories: tokens and mask [..., T].
      candidates: [..., M].
      length: K, at least 1.

    Returns:
      Windows [..., M, K], cut where the row ends; token 0 where the mask is
      False.

    Raises:
      ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1; the paper's: 50")
    mask = slice_windows(trajectories.mask, candidates.positions, length)
    mask &= candidates.mask[..., None]
    tokens = slice_windows(trajectories.tokens, candidates.positions, length)
    return Windows(jnp.where(mask, tokens, 0), mask)


def future_loss(
    token_loss: jax.Array,
    mask: jax.Array,
    candidates: Candidates,
    *,
    length: int,
) -> jax.Array:
    """Mean token loss of the student's own window: a detector without a branch.

    ``mean_{i < K} l_{t + i}``. Ours: where the futures part, the teacher goes
    on disagreeing with what the student writes; where only the surface
    differs, it agrees again. Nothing is decoded and nothing transported, so
    it costs next to nothing.

    Args:
      token_loss: f32[..., T] of each token, e.g. -log p_T(y_t), nats.
      mask: bool[..., T] which tokens exist.
      candidates: [..., M].
      length: K, at least 1.

    Returns:
      f32[..., M] nats a token, over the tokens that exist; 0 in unused slots.

    Raises:
      ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1; the paper's: 50")
    exists = slice_windows(mask, candidates.positions, length)
    exists &= candidates.mask[..., None]
    losses = slice_windows(token_loss, candidates.positions, length)
    total = jnp.sum(jnp.where(exists, losses, 0.0), axis=-1)
    count = jnp.sum(exists, axis=-1)
    return jax.lax.stop_gradient(total / jnp.maximum(count, 1))


def masked_quantile(
    values: jax.Array, mask: jax.Array, quantile: float
) -> jax.Array:
    """Quantile over the last axis of what exists, linearly interpolated.

    Args:
      values: f32[..., N]; whatever stands outside the mask is ignored.
      mask: bool[..., N].
      quantile: 0..1; 0.5 is the median of ``numpy.median``.

    Returns:
      f32[...]; +inf where nothing exists.
    """
    count = mask.sum(axis=-1, keepdims=True)
    ordered = jnp.sort(
        jnp.where(mask, values.astype(jnp.float32), jnp.inf), axis=-1
    )
    last = jnp.maximum(count - 1, 0)
    rank = quantile * last
    low = jnp.floor(rank).astype(jnp.int32)
    below = jnp.take_along_axis(ordered, low, axis=-1)
    above = jnp.take_along_axis(ordered, jnp.minimum(low + 1, last), axis=-1)
    # Neither inf - inf nor 0 * inf; between equal ends the result is exact.
    part = rank - low
    between = (part > 0) & (above > below)
    return (below + jnp.where(between, part * (above - below), 0.0))[..., 0]


def divergence_mask(
    distance: jax.Array,
    candidates: Candidates,
    *,
    percentile: float = 30.0,
    threshold: float | None = None,
) -> jax.Array:
    """Candidates whose near future parts from the teacher's.

    arXiv:2606.00305, §3, leaves the rule open. Ours: a distance strictly above
    the percentile of *all* valid candidates of the batch, whatever its leading
    dimensions, or strictly above a fixed threshold (for instance the upper
    quartile of the distances of low-loss tokens, §2.1). The percentile ranks:
    where all distances are equal, or there is one candidate only, nothing
    stands out and nothing is divergent; with ties at the percentile, the tied
    candidates are not.

    Args:
      distance: f32[..., M] transport distance, 0..2.
      candidates: [..., M].
      percentile: 0..100, of the batch's valid candidates; ignored where a
        threshold is given.
      threshold: a distance, or None.

    Returns:
      bool[..., M], False in unused slots.

    Raises:
      ValueError: for a percentile outside 0..100 or a negative threshold.
    """
    if threshold is None:
        if not 0 <= percentile <= 100:
            raise ValueError(
                f"percentile={percentile} must lie in 0..100; "
                "30 calls about 30 % of the candidates false alarms"
            )
        threshold = masked_quantile(
            distance.ravel(), candidates.mask.ravel(), percentile / 100
        )
    elif isinstance(threshold, int | float) and threshold < 0:
        raise ValueError(
            f"threshold={threshold} must be at least 0: distances lie in 0..2"
        )
    return jax.lax.stop_gradient(candidates.mask & (distance > threshold))


def false_alarm_mask(
    distance: jax.Array,
    candidates: Candidates,
    *,
    percentile: float = 30.0,
    threshold: float | None = None,
) -> jax.Array:
    """Candidates of high loss whose near future is the teacher's all the same.

    Every valid candidate that is not divergent (arXiv:2606.00305, §2.1, §5.1).

    Args:
      distance: f32[..., M] transport distance, 0..2.
      candidates: [..., M].
      percentile: as in :func:`divergence_mask`.
      threshold: as in :func:`divergence_mask`.

    Returns:
      bool[..., M], False in unused slots.

    Raises:
      ValueError: as :func:`divergence_mask`.
    """
    divergent = divergence_mask(
        distance, candidates, percentile=percentile, threshold=threshold
    )
    return candidates.mask & ~divergent


def matched_control_mask(
    key: jax.Array, divergent: jax.Array, false_alarm: jax.Array
) -> jax.Array:
    """As many divergent candidates, at random, as there are false alarms.

    The control of arXiv:2606.00305, §5.1: capping these instead must hurt.
    Numbers match over the whole batch, not row by row (ours). Where there are
    fewer divergent candidates than false alarms, all of them are taken.

    Args:
      key: PRNG key.
      divergent: bool[..., M] of :func:`divergence_mask`.
      false_alarm: bool[..., M] of :func:`false_alarm_mask`.

    Returns:
      bool[..., M], a subset of ``divergent``.
    """
    lot = jax.random.uniform(key, (divergent.size,))
    lot = jnp.where(divergent.ravel(), lot, 2.0)
    # Rank by position in the order, so that equal lots cannot both win.
    rank = jnp.argsort(jnp.argsort(lot))
    chosen = (rank < jnp.sum(false_alarm)).reshape(divergent.shape)
    return chosen & divergent


def scatter_to_tokens(
    candidates: Candidates, flags: jax.Array, length: int
) -> jax.Array:
    """Flags of candidates as flags of the tokens they stand at.

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
    """Weights that cap selected tokens' loss at their row's median.

    ``w_t = median / l_t`` where t is selected and ``l_t > median``, else 1
    (arXiv:2606.00305, §5.1). A stopped weight (ours): ``min(l_t, median)``
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
    """
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
    """More weight for the n tokens from each divergent state on (ours).

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
