"""The objective of some rows: states, weights, divergence, guidance.

Everything that is differentiated is here. The student reads the trajectories
(with context "teacher" the branches ride along as extra columns that see
their prefix and themselves), the fused divergence takes its weights from the
annotations, and guidance is added at divergent points.
"""

from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.data.packing import PackedRows
from topd_jax.losses import fused, near_future, trajectory
from topd_jax.models.attention.masks import branch_spans, causal_spans
from topd_jax.models.decoder import mask_for
from topd_jax.objectives import baselines
from topd_jax.objectives.objective import Objective
from topd_jax.training.sft import packed_states
from topd_jax.types import Annotations, Head, Trajectories, completion_states


def batch_loss(
    student: Any,
    teacher_head: Head,
    trajectories: Trajectories | PackedRows,
    annotations: Annotations,
    totals: tuple[jax.Array, jax.Array],
    objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective of some rows, over given denominators.

    Args:
      student: the model that is differentiated.
      teacher_head: [V, D_teacher].
      trajectories: some rows; offline also packed ones.
      annotations: of the same rows.
      totals: (tokens, divergent points), f32[] each, of the whole batch.
      objective: see :class:`Objective`.

    Returns:
      (loss f32[], sums to log: "divergence" over tokens, "guidance" over
      divergent points).
    """
    if objective.offline:
        return _offline_loss(
            student, teacher_head, trajectories, annotations, totals, objective
        )
    hidden, along = _student_states(
        student, trajectories, annotations, objective
    )
    heads = dict(
        student_hidden=hidden,
        student_head=student.head,
        teacher_hidden=annotations.teacher_hidden,
        teacher_head=teacher_head,
    )
    if objective.pieces.replaces == "trust_region":
        total, token_loss = baselines.trust_region(
            heads, trajectories, annotations, objective
        )
    else:
        weights = _token_weights(trajectories, annotations, heads, objective)
        total, token_loss = fused.fused_weighted_sum(
            **heads, weights=weights, **fused_options(objective)
        )
    loss = total / jnp.maximum(totals[0], 1.0)
    mask = trajectories.mask
    sums = {"divergence": jnp.sum(jnp.where(mask, token_loss, 0.0))}
    if objective.pieces.guides:
        per_point = _guidance(
            hidden, along, student, teacher_head, annotations, objective
        )
        led = jnp.sum(jnp.where(annotations.divergent, per_point, 0.0))
        loss += objective.guidance_weight * led / jnp.maximum(totals[1], 1.0)
        sums["guidance"] = led
    return loss, sums


def fused_options(objective: Objective) -> dict[str, Any]:
    """What an objective tells the fused losses, as keyword arguments."""
    divergence = objective.divergence
    if objective.pieces.replaces == "entropy_aware":
        divergence = baselines.entropy_aware(objective)
    return dict(
        divergence=divergence,
        beta=objective.beta,
        temperature=objective.temperature,
        log_floor=objective.log_floor,
        chunk_size=objective.chunk_size,
    )


def _token_weights(
    trajectories: Trajectories,
    notes: Annotations,
    heads: dict[str, jax.Array],
    objective: Objective,
) -> jax.Array:
    """f32[B, T]: mask times what the variant makes of each token."""
    mask, pieces = trajectories.mask, objective.pieces
    weights = mask.astype(jnp.float32)
    if pieces.weighs:
        return notes.weights
    if pieces.spreads:
        return near_future.n_step_weights(
            notes.divergent,
            notes.candidates,
            mask,
            n=objective.n_step,
            discount=objective.discount,
            strength=objective.strength,
            cap=objective.cap,
        )
    if pieces.caps:
        # A pass without gradient: the weights need the losses first.
        token_loss = jax.lax.stop_gradient(
            fused.fused_divergence(
                **jax.lax.stop_gradient(heads), **fused_options(objective)
            )
        )
        selected = near_future.scatter_to_tokens(
            notes.candidates, notes.capped, mask.shape[-1]
        )
        weights *= near_future.median_cap_weights(token_loss, mask, selected)
    return weights


def _guidance(
    hidden: jax.Array,
    along: jax.Array | None,
    student: Any,
    teacher_head: Head,
    notes: Annotations,
    objective: Objective,
) -> jax.Array:
    """f32[B, M]: the trajectory loss of each candidate."""
    theirs = notes.teacher_windows
    chunk = objective.chunk_size
    vocab = min(student.head.shape[0], teacher_head.shape[0])
    if objective.context == "student":
        logp = trajectory.student_context_logprobs(
            hidden,
            student.head,
            notes.candidates,
            theirs,
            vocab_size=vocab,
            chunk_size=chunk,
        )
        targets = trajectory.trajectory_targets(
            notes.plan,
            theirs,
            notes.student_windows,
            anchor_first=objective.anchor_first,
        )
        return trajectory.trajectory_loss(targets, logp, theirs)
    if objective.branch_loss == "cross_entropy":
        per_token = -fused.fused_token_logprobs(
            along, student.head, theirs.tokens,
            vocab_size=vocab, chunk_size=chunk,
        )  # fmt: skip
    else:
        per_token = fused.fused_divergence(
            along,
            student.head,
            notes.teacher_window_hidden,
            teacher_head,
            divergence=objective.branch_loss,
            log_floor=objective.log_floor,
            chunk_size=chunk,
        )
    return trajectory.window_mean(per_token, theirs.mask)


def _offline_loss(
    student: Any,
    teacher_head: Head,
    trajectories: Trajectories | PackedRows,
    annotations: Annotations,
    totals: tuple[jax.Array, jax.Array],
    objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """kd_ratio * forward KL + (1 - kd_ratio) * cross-entropy (App. B)."""
    hidden, _ = _student_states(student, trajectories, annotations, objective)
    mask = trajectories.mask
    options = fused_options(objective) | {"divergence": "forward_kl"}
    distilled, token_loss = fused.fused_weighted_sum(
        hidden,
        student.head,
        annotations.teacher_hidden,
        teacher_head,
        weights=mask.astype(jnp.float32),
        **options,
    )
    logp = fused.fused_token_logprobs(
        hidden,
        student.head,
        trajectories.tokens,
        vocab_size=min(student.head.shape[0], teacher_head.shape[0]),
        chunk_size=objective.chunk_size,
    )
    followed = -jnp.sum(jnp.where(mask, logp, 0.0))
    ratio = objective.kd_ratio
    loss = (ratio * distilled + (1 - ratio) * followed) / jnp.maximum(
        totals[0], 1.0
    )
    return loss, {
        "divergence": jnp.sum(jnp.where(mask, token_loss, 0.0)),
        "cross_entropy": jax.lax.stop_gradient(followed),
    }


def _student_states(
    student: Any,
    trajectories: Trajectories | PackedRows,
    notes: Annotations,
    objective: Objective,
) -> tuple[jax.Array, jax.Array | None]:
    """States of the rollout [B, T, D] and along the branches [B, M, K, D].

    With context "teacher" the branches ride along as extra columns, each
    seeing its prefix and itself. The first state of a branch is the rollout's
    own: both contexts are y_{<t}.
    """
    if isinstance(trajectories, PackedRows):
        return packed_states(student, trajectories), None
    tokens, positions = trajectories.sequence, trajectories.positions
    exists = trajectories.sequence_mask
    prompt = trajectories.prompt.shape[1]
    if not objective.trains_on_branch:
        spans = mask_for(student, causal_spans(exists))
        hidden, _ = student(tokens, positions, spans)
        return completion_states(hidden, prompt), None
    theirs, candidates = notes.teacher_windows, notes.candidates
    length = tokens.shape[1]
    start = candidates.positions + prompt  # column of y_t
    rows, count, window = theirs.tokens.shape
    ride = theirs.tokens[..., :-1].reshape(rows, -1)
    first = jnp.take_along_axis(positions, start - 1, axis=1) + 1
    ride_positions = first[..., None] + jnp.arange(window - 1)
    spans = branch_spans(exists, start, theirs.mask[..., :-1])
    hidden, _ = student(
        jnp.concatenate([tokens, ride], axis=1),
        jnp.concatenate([positions, ride_positions.reshape(rows, -1)], axis=1),
        mask_for(student, spans),
    )
    states = completion_states(hidden[:, :length], prompt)
    at_start = jnp.take_along_axis(
        states, candidates.positions[..., None], axis=1
    )
    along = hidden[:, length:].reshape(rows, count, window - 1, -1)
    return states, jnp.concatenate([at_start[:, :, None], along], axis=2)
