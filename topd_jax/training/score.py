"""The teachers read what the student wrote, and look ahead.

One forward pass of each teacher over its rows keeps its final hidden
states and its cache, never logits; candidates, the teacher's branches on that
same cache, transport and masks follow (arXiv:2606.00305, §3). The cache is
freed here, and no gradient flows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.data.teachers import split_rows
from topd_jax.losses import near_future
from topd_jax.losses.fused import fused_token_logprobs
from topd_jax.models.layerwise import unstack
from topd_jax.models.passes import trajectory_cache, trajectory_states
from topd_jax.models.protocol import LanguageModel
from topd_jax.objectives.objective import NO_PLAN, Detection, Objective
from topd_jax.objectives.pieces import ask, spelled
from topd_jax.objectives.statistics import token_statistics
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.rules import reading_rules, using
from topd_jax.sampling import branch, branch_columns
from topd_jax.types import Candidates, Layout, Scored, Teacher, Trajectories


def score(
    student: LanguageModel,
    teachers: Sequence[Teacher],
    trajectories: Trajectories,
    key: jax.Array,
    *,
    objective: Objective,
    eos_ids: tuple[int, ...],
    pad_id: int,
    branch_sharding: str = "train",
    layout: Layout | None = None,
) -> tuple[Scored, ...]:
    """Let every teacher read its rows, and look ahead (arXiv:2606.00305, §3).

    Args:
      student: the model that wrote; its embedding is the space of the
        transport cost. It runs only where it is a teacher, or the objective
        compares both models before it trains (``objective.needs_student``).
      teachers: rows are consecutive and in their order.
      trajectories: B rows that the student wrote. A teacher reads them after
        ``teacher_prompt``, and its branches continue what it read.
      key: PRNG key of sampled branches, of the matched control, and of the
        draws that pieces name.
      objective: says what is computed.
      eos_ids: end-of-sequence ids.
      pad_id: id put where no token is.
      branch_sharding: where a teacher's parameters are while it writes its
        branches, of :data:`~topd_jax.parallel.rules.DECODING`.
      layout: of the fused losses; None takes the mesh in use and the rules in
        force.

    Returns:
      What each teacher says, all of it data.

    Raises:
      ValueError: where rows and teachers do not fit together, a detector
        returns no :class:`Detection`, or a guidance asks for a plan that the
        detector does not make.
    """
    layout = loss_layout() if layout is None else layout
    parts = split_rows(trajectories, teachers)
    keys = [key]
    if len(teachers) > 1:
        keys = [jax.random.fold_in(key, i) for i in range(len(teachers))]
    with using(reading_rules()):
        return tuple(
            _score_rows(
                student, teacher, rows, own_key,
                objective=objective, layout=layout, eos_ids=eos_ids,
                pad_id=pad_id, sharding=branch_sharding,
            )
            for teacher, rows, own_key in zip(
                teachers, parts, keys, strict=True
            )
        )  # fmt: skip


def _score_rows(
    student: LanguageModel,
    teacher: Teacher,
    trajectories: Trajectories,
    key: jax.Array,
    *,
    objective: Objective,
    layout: Layout,
    **branching: Any,
) -> Scored:
    model, mask = teacher.beside(student), trajectories.mask
    vocab = min(student.head.shape[0], model.head.shape[0])
    read = trajectories.for_teacher
    if objective.needs_branches:
        ahead = objective.near_future
        extra = branch_columns(objective.branches, ahead.window)
        columns = read.sequence.shape[1] + extra
        model = unstack(model, columns + ahead.window)
        hidden, cache = trajectory_cache(model, read, columns)
    else:
        hidden, cache = trajectory_states(model, read), None
    logp = fused_token_logprobs(
        hidden, model.head, trajectories.tokens,
        vocab_size=vocab, layout=layout,
    )  # fmt: skip
    scored = Scored(
        model.head, hidden, jnp.where(mask, -logp, 0.0), teacher=teacher.name
    )
    if objective.draws:
        uniforms = jax.random.uniform(key, mask.shape)
        scored = scored.replace(uniforms=uniforms)
    offered = _offered(student, trajectories, scored, objective, layout)
    if objective.near_future is not None:
        scored = _look_ahead(
            student, model, read, scored, offered, cache, key,
            objective=objective, vocab=vocab, **branching,
        )  # fmt: skip
    if objective.batch_weights:
        weights = jnp.ones(mask.shape, jnp.float32)
        for weight in objective.batch_weights:
            own = ask(weight, offered | vars(scored))
            weights *= jnp.where(mask, own, 0.0)  # 0 * NaN would be NaN
        scored = scored.replace(weights=weights)
    # The step has the student's: its arrays would be here twice.
    head = None if teacher.model is None else model.head
    return jax.lax.stop_gradient(scored).replace(teacher_head=head)


def _offered(
    student: LanguageModel,
    trajectories: Trajectories,
    scored: Scored,
    objective: Objective,
    layout: Layout,
) -> dict[str, Any]:
    """Return what ranking and weights may name of each token."""
    offered = {
        "mask": trajectories.mask,
        "tokens": trajectories.tokens,
        "teacher_token_loss": scored.teacher_token_loss,
        "uniforms": scored.uniforms,
    }
    if not objective.needs_student:
        return offered
    pieces = objective.batch_weights
    if objective.near_future is not None:
        pieces += (objective.near_future.ranking,)
    return offered | token_statistics(
        objective.compares(pieces),
        trajectory_states(student, trajectories),
        student.head,
        scored.teacher_hidden,
        scored.teacher_head,
        {"tokens": trajectories.tokens, "uniforms": scored.uniforms},
        layout=layout,
        extra=objective.statistics,
        token_loss=objective.token_loss,
        temperature=objective.temperature,
    )


def _candidates(objective: Objective, offered: dict[str, Any]) -> Candidates:
    """Select the tokens that are looked at."""
    ahead, mask = objective.near_future, offered["mask"]
    candidates = near_future.select_candidates(
        ask(ahead.ranking, offered), mask, count=ahead.candidates,
        fraction=ahead.fraction,
    )  # fmt: skip
    if objective.branch_fraction == 1:
        return candidates
    likely = near_future.future_loss(
        offered["teacher_token_loss"], mask, candidates, length=ahead.window
    )
    return near_future.shortlist(
        likely, candidates, fraction=objective.branch_fraction
    )


def _look_ahead(
    student: LanguageModel,
    model: LanguageModel,
    read: Trajectories,
    scored: Scored,
    offered: dict[str, Any],
    cache: Any,
    key: jax.Array,
    *,
    objective: Objective,
    vocab: int,
    **branching: Any,
) -> Scored:
    """Select candidates, continue them, and say where futures part."""
    ahead = objective.near_future
    branch_key, select_key = jax.random.split(key)
    candidates = _candidates(objective, offered)
    windows = near_future.student_windows(read, candidates, length=ahead.window)
    scored = scored.replace(candidates=candidates, student_windows=windows)
    if objective.needs_branches:
        continued, states = branch(
            model, cache, scored.teacher_hidden, read, candidates,
            length=ahead.window, temperature=ahead.branch_temperature,
            key=branch_key, vocab_size=vocab,
            return_hidden=objective.needs_window_hidden, **branching,
        )  # fmt: skip
        scored = scored.replace(
            teacher_windows=continued, teacher_window_hidden=states
        )
    found = ask(
        ahead.detector,
        offered
        | vars(scored)
        | {"embedding": student.embedding, "window": ahead.window},
    )
    if not isinstance(found, Detection):
        raise ValueError(
            f"detector {spelled(ahead.detector)} returned {found!r:.60} and "
            "must return a topd_jax.Detection(distance)"
        )
    rule = dict(percentile=ahead.percentile, threshold=ahead.threshold)
    divergent = near_future.divergence_mask(found.distance, candidates, **rule)
    scored = scored.replace(
        distance=found.distance,
        plan=found.plan,
        divergent=divergent,
        false_alarm=candidates.mask & ~divergent,
    )
    if found.plan is None and "plan" in objective.named:
        raise ValueError(NO_PLAN)
    selected = ask(ahead.select, vars(scored) | {"key": select_key})
    return scored.replace(selected=selected)
