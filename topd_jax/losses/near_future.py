"""Where the futures part: candidates, windows, masks, and weights from them.

arXiv:2606.00305, §3. A high token loss says that student and teacher disagree
about one token, not that it matters: about 30 % of such disagreements lead to
the same future (§2.1). So the tokens of highest loss are only *candidates*;
from each, K tokens of student and teacher are compared by transport. A
candidate whose distance is high is *divergent*, the others are *false
alarms*. Weights of the token loss follow from the two masks
(:mod:`topd_jax.losses.token_weights`). The paper has neither the percentile
rule nor the detector without a branch.

Every function here is pure and free of gradient: masks, indices and weights
are data. All of them are written as comparisons, sorts and sums; scatters and
element-wise gathers are slow on accelerators.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.types import Candidates, Trajectories, Windows


def masked_quantile(
    values: jax.Array, mask: jax.Array, quantile: float
) -> jax.Array:
    """Compute a quantile over the last axis of what exists, interpolated.

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


def select_candidates(
    token_loss: jax.Array,
    mask: jax.Array,
    *,
    count: int,
    fraction: float | None = None,
) -> Candidates:
    """Select the ``count`` tokens of highest loss of each row.

    arXiv:2606.00305, §3 (top m by loss). With ``fraction``, a row of N tokens
    fills ``ceil(fraction * N)`` of its slots, never more than ``count`` (the
    paper's 218 of 9688 is one row's, and rows differ in length). Among equal
    losses the earlier token goes first. Never padding, and never a token whose
    loss is NaN or -inf.

    Args:
      token_loss: f32[..., T] score of each token, e.g. -log p_T(y_t).
      mask: bool[..., T] which tokens exist.
      count: M, slots a row, 1..T.
      fraction: share of a row's tokens to take, 0..1; None fills every slot.

    Returns:
      Candidates [..., M], positions ascending.

    Raises:
      ValueError: for a count outside 1..T or a fraction outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> loss, mask = jnp.array([1.0, 9.0, 2.0, 7.0]), jnp.ones(4, bool)
      >>> select_candidates(loss, mask, count=2).positions.tolist()
      [1, 3]
    """
    chex.assert_type([mask], bool)
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


def shortlist(
    score: jax.Array, candidates: Candidates, *, fraction: float
) -> Candidates:
    """Keep the candidates of highest score of each row.

    A branch costs the teacher K tokens and, where the student is trained along
    it, the student too. What a free score calls a false alarm need not have
    one. The paper has no such step; there every candidate has a branch.

    Args:
      score: f32[..., M], for instance of :func:`future_loss`.
      candidates: [..., M].
      fraction: share to keep of each row's candidates, rounded up, 0..1.

    Returns:
      Candidates [..., ceil(fraction * M)], positions ascending.

    Raises:
      ValueError: for a fraction outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> at = Candidates(jnp.array([2, 5, 9]), jnp.ones(3, bool))
      >>> shortlist(jnp.array([1.0, 3.0, 2.0]), at, fraction=0.3).positions
      Array([5], dtype=int32)
    """
    _check_fraction(fraction)
    slots = candidates.positions.shape[-1]
    kept = select_candidates(
        score,
        candidates.mask,
        count=math.ceil(fraction * slots - 1e-9),
        fraction=fraction,
    )
    positions = jnp.take_along_axis(
        candidates.positions, kept.positions, axis=-1
    )
    return Candidates(jnp.where(kept.mask, positions, 0), kept.mask)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length} must be at least 1; the paper's: 50")


def _check_fraction(fraction: float | None) -> None:
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} must lie above 0 and at most 1; None fills "
            "every slot"
        )


def slice_windows(
    values: jax.Array, positions: jax.Array, length: int
) -> jax.Array:
    """Slice ``values[t : t + K]`` for each position t, zeros past the end.

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
    """Slice the rollout itself from each candidate on: ``y[t : t + K]``.

    The rollout is already a sample of the student at that prefix, costs
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
    _check_length(length)
    chex.assert_type([trajectories.mask, candidates.mask], bool)
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
    """Compute the mean token loss of the student's window: no branch needed.

    ``mean_{i < K} l_{t + i}``. Where the futures part, the teacher goes
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

    Example:
      >>> import jax.numpy as jnp
      >>> loss, mask = jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool)
      >>> at = Candidates(jnp.array([1]), jnp.array([True]))
      >>> future_loss(loss, mask, at, length=2).tolist()
      [2.5]
    """
    _check_length(length)
    chex.assert_type([mask, candidates.mask], bool)
    exists = slice_windows(mask, candidates.positions, length)
    exists &= candidates.mask[..., None]
    losses = slice_windows(token_loss, candidates.positions, length)
    total = jnp.sum(jnp.where(exists, losses, 0.0), axis=-1)
    count = jnp.sum(exists, axis=-1)
    return jax.lax.stop_gradient(total / jnp.maximum(count, 1))


def divergence_mask(
    distance: jax.Array,
    candidates: Candidates,
    *,
    percentile: float = 30.0,
    threshold: float | None = None,
) -> jax.Array:
    """Mark the candidates whose near future parts from the teacher's.

    arXiv:2606.00305, §3, leaves the rule open. Here: a distance strictly above
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

    Example:
      >>> import jax.numpy as jnp
      >>> at = Candidates(jnp.array([0, 3]), jnp.array([True, True]))
      >>> distance = jnp.array([0.1, 0.9])
      >>> divergence_mask(distance, at, threshold=0.5).tolist()
      [False, True]
    """
    chex.assert_type([candidates.mask], bool)
    if threshold is None:
        if not 0 <= percentile <= 100:
            raise ValueError(
                f"percentile={percentile} must lie in 0..100; "
                "30 calls about 30 % of the candidates false alarms"
            )
        threshold = masked_quantile(
            distance.ravel(), candidates.mask.ravel(), percentile / 100
        )
    elif isinstance(threshold, int | float) and not threshold >= 0:
        raise ValueError(
            f"threshold={threshold} must be at least 0: distances lie in 0..2"
        )
    return jax.lax.stop_gradient(candidates.mask & (distance > threshold))


def matched_control_mask(
    key: jax.Array, divergent: jax.Array, false_alarm: jax.Array
) -> jax.Array:
    """Choose as many divergent candidates as there are false alarms.

    The control of arXiv:2606.00305, §5.1, at random: capping these instead
    must hurt. Numbers match over the whole batch, not row by row. Where there
    are fewer divergent candidates than false alarms, all of them are taken.

    Args:
      key: PRNG key.
      divergent: bool[..., M] of :func:`divergence_mask`.
      false_alarm: bool[..., M] the other valid candidates (§2.1).

    Returns:
      bool[..., M], a subset of ``divergent``.
    """
    chex.assert_type([divergent, false_alarm], bool)
    uniforms = jax.random.uniform(key, (divergent.size,))
    uniforms = jnp.where(divergent.ravel(), uniforms, 2.0)
    # Rank by position in the order, so that equal draws cannot both win.
    rank = jnp.argsort(jnp.argsort(uniforms))
    chosen = (rank < jnp.sum(false_alarm)).reshape(divergent.shape)
    return chosen & divergent
