"""The teacher reads what the student wrote, and looks ahead.

One forward pass of the frozen teacher over the trajectories keeps its final
hidden states and its cache, never logits; candidates, the teacher's branches
on that same cache, transport and masks follow (arXiv:2606.00305, §3). The
cache dies here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.losses import fused, near_future
from topd_jax.losses.optimal_transport import window_distance
from topd_jax.models.attention.masks import causal_spans
from topd_jax.models.decoder import mask_for
from topd_jax.objectives import baselines
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.sharding import READING, using
from topd_jax.sampling import branch, branch_columns
from topd_jax.training.loss import fused_options
from topd_jax.types import Annotations, Trajectories, completion_states


@using(READING)
def annotate(
    student: Any,
    teacher: Any,
    trajectories: Trajectories,
    key: jax.Array,
    *,
    objective: Objective,
    eos_ids: tuple[int, ...],
    pad_id: int,
    score: jax.Array | None = None,
    first_row: int | jax.Array = 0,
    student_states: jax.Array | None = None,
) -> Annotations:
    """Lets the teacher read what the student wrote, and look ahead.

    arXiv:2606.00305, §3. One teacher forward pass; its branches continue on
    the cache of that pass.

    Args:
      student: the model that wrote; its embedding is the space of the
        transport cost, and it is run only where ``objective.score`` asks.
      teacher: the frozen model.
      trajectories: what the student wrote.
      key: PRNG key of sampled branches and of the matched control.
      objective: see :class:`Objective`.
      eos_ids: end-of-sequence ids.
      pad_id: id put where nothing is.
      score: f32[B, T] what candidates are ranked by; None takes
        ``objective.score``.
      first_row: of a larger batch, of which these rows are a slice; what
        :func:`decide` says is then of the slice, until it is asked again.
      student_states: [B, T, D_student] what the student has read already; of
        it head and embedding are needed then. None: it reads here, where
        ``objective.needs_student_states``.

    Returns:
      Annotations, all of them stopped.
    """
    if student_states is None and objective.needs_student_states:
        student_states = read(student, trajectories)
    columns = trajectories.sequence.shape[1]
    ahead, extra = objective.needs_branches, 0
    if ahead:
        extra = branch_columns(objective.candidates, objective.window)
    hidden, cache = _read(teacher, trajectories, columns + extra, ahead)
    loss = -fused.fused_token_logprobs(
        hidden,
        teacher.head,
        trajectories.tokens,
        vocab_size=_shared(student, teacher),
        chunk_size=objective.chunk_size,
    )
    notes = Annotations(hidden, jnp.where(trajectories.mask, loss, 0.0))
    if objective.pieces.looks_ahead:
        if score is None:
            score = _own_score(
                student, student_states, teacher, notes, objective
            )
        notes = _look_ahead(
            student, teacher, trajectories, notes, cache, key,
            objective=objective, eos_ids=eos_ids, pad_id=pad_id, score=score,
            first_row=first_row,
        )  # fmt: skip
    if objective.pieces.weighs:
        found = baselines.token_statistics(
            student_states, student.head,
            hidden, teacher.head, trajectories.tokens, objective,
        )  # fmt: skip
        notes = notes.replace(
            weights=baselines.sibling_weights(
                found, trajectories.mask, objective
            )
        )
    return jax.lax.stop_gradient(decide(notes, key, objective))


def decide(
    notes: Annotations, key: jax.Array, objective: Objective
) -> Annotations:
    """What depends on the whole batch: the masks, and lots.

    A percentile of the batch's distances is not that of a part of it: where
    slices were annotated apart, they are joined and decided on once more.

    Args:
      notes: of a batch, with their distances where something looks ahead.
      key: that :func:`annotate` was given.
      objective: see :class:`Objective`.

    Returns:
      The notes with ``divergent``, ``false_alarm``, ``capped`` and ``lots``
      as far as the objective has them.
    """
    if objective.pieces.replaces == "trust_region":
        shape = notes.teacher_token_loss.shape
        notes = notes.replace(lots=jax.random.uniform(key, shape))
    if not objective.pieces.looks_ahead:
        return notes
    rule = dict(percentile=objective.percentile, threshold=objective.threshold)
    distance, candidates = notes.distance, notes.candidates
    divergent = near_future.divergence_mask(distance, candidates, **rule)
    false_alarm = near_future.false_alarm_mask(distance, candidates, **rule)
    capped = false_alarm
    if objective.pieces.caps == "control":
        _, control_key = jax.random.split(key)
        capped = near_future.matched_control_mask(
            control_key, divergent, false_alarm
        )
    return notes.replace(
        divergent=divergent, false_alarm=false_alarm, capped=capped
    )


def _shared(student: Any, teacher: Any) -> int:
    return min(student.head.shape[0], teacher.head.shape[0])


def read(model: Any, trajectories: Trajectories) -> jax.Array:
    """The states that predict each completion token.

    Args:
      model: any model.
      trajectories: B rows.

    Returns:
      [B, T, D] in completion coordinates and compute dtype.
    """
    return _read(model, trajectories, 0, False)[0]


def _read(
    model: Any, trajectories: Trajectories, columns: int, keep: bool
) -> tuple[jax.Array, Any]:
    """States in completion coordinates, and the cache where it is kept."""
    tokens = trajectories.sequence
    spans = causal_spans(trajectories.sequence_mask)
    cache = None
    if keep:
        cache = model.init_cache(tokens.shape[0], columns)
        spans = spans.widen(columns)
    hidden, cache = model(
        tokens, trajectories.positions, mask_for(model, spans), cache
    )
    return completion_states(hidden, trajectories.prompt.shape[1]), cache


def _look_ahead(
    student: Any,
    teacher: Any,
    trajectories: Trajectories,
    notes: Annotations,
    cache: Any,
    key: jax.Array,
    *,
    objective: Objective,
    eos_ids: tuple[int, ...],
    pad_id: int,
    score: jax.Array,
    first_row: int | jax.Array,
) -> Annotations:
    branch_key, _ = jax.random.split(key)
    candidates = near_future.select_candidates(
        score,
        trajectories.mask,
        count=objective.candidates,
        fraction=objective.fraction,
    )
    ours = near_future.student_windows(
        trajectories, candidates, length=objective.window
    )
    notes = notes.replace(candidates=candidates, student_windows=ours)
    if objective.needs_branches:
        continued = branch(
            teacher, cache, notes.teacher_hidden, trajectories, candidates,
            length=objective.window, eos_ids=eos_ids, pad_id=pad_id,
            temperature=objective.branch_temperature, key=branch_key,
            vocab_size=_shared(student, teacher),
            return_hidden=objective.needs_window_hidden, first_row=first_row,
            sharding=objective.branch_sharding,
        )  # fmt: skip
        theirs, states = (
            continued if objective.needs_window_hidden else (continued, None)
        )
        notes = notes.replace(
            teacher_windows=theirs, teacher_window_hidden=states
        )
    distance, plan = _distance(student, trajectories, notes, objective)
    return notes.replace(distance=distance, plan=plan)


def _distance(
    student: Any,
    trajectories: Trajectories,
    notes: Annotations,
    objective: Objective,
) -> tuple[jax.Array, jax.Array | None]:
    """f32[B, M] how far the futures part, and the plan where there is one."""
    if objective.detector == "future_loss":
        return near_future.future_loss(
            notes.teacher_token_loss,
            trajectories.mask,
            notes.candidates,
            length=objective.window,
        ), None
    return window_distance(
        student.embedding,
        notes.student_windows,
        notes.teacher_windows,
        epsilon=objective.epsilon,
        position_weight=objective.position_weight,
    )


def _own_score(
    student: Any,
    states: jax.Array | None,
    teacher: Any,
    notes: Annotations,
    objective: Objective,
) -> jax.Array:
    """f32[B, T]: what the objective ranks candidates by."""
    if objective.score == "teacher_loss":
        return notes.teacher_token_loss
    return fused.fused_divergence(
        states,
        student.head,
        notes.teacher_hidden,
        teacher.head,
        **fused_options(objective),
    )
