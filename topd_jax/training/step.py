"""One training step: loss, gradient, accumulation, update, metrics.

    trajectories = rollout(student, prompts, key, ...)
    scored = score(student, teachers, trajectories, key, objective=objective)
    state, metrics = train_step(state, trajectories, scored,
                                objective=objective, optimizer=optimizer)

Three pure functions. This file tells all of the last one, in the order in
which it happens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from topd_jax.data.teachers import by_name, total_metrics
from topd_jax.evaluation.metrics import repeated_tokens
from topd_jax.models.lora import join, split
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.layouts import loss_layout
from topd_jax.training.loss import batch_loss
from topd_jax.types import Layout, Scored, Trajectories

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      student: what is trained of it: the whole model, or its adapters; see
        :func:`topd_jax.models.lora.split`.
      opt_state: the optimizer's state.
      step: i32[] updates tried.
      skipped: i32[] updates left out because something was not finite.
    """

    student: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


def init_state(
    student: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Make a fresh train state.

    Args:
      student: the model; of one with adapters only these are kept.
      optimizer: any optax transformation.

    Returns:
      The state at step 0, with copies of the student's arrays: a step donates
      them, and the caller may start a second run from the same ones.
    """
    student = jax.tree.map(jnp.copy, split(student)[0])
    # Two zeros: one buffer cannot be donated twice.
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return TrainState(student, optimizer.init(student), *zeros)


def train_step(
    state: TrainState,
    trajectories: Trajectories,
    scored: Sequence[Scored],
    frozen: Any = None,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """Make one gradient step on the objective.

    Both denominators of the loss are taken over the whole batch: all devices,
    accumulation slices and teachers.

    Args:
      state: donate it.
      trajectories: B rows, B divisible by ``accumulate``.
      scored: of the same rows, one entry a teacher; the rows of each are
        consecutive and in this order.
      frozen: what of the student is not trained, from
        :func:`topd_jax.models.lora.split`; do not donate it. None: nothing.
      objective: what is trained on.
      optimizer: the transformation that ``state.opt_state`` belongs to.
      accumulate: slices the batch is worked through in.
      layout: of the fused losses; None takes the mesh in use.

    Returns:
      (new state, metrics as name -> (sum, count); of several teachers, also
      "name/teacher"). Where the loss or the gradient is not finite the
      parameters and optimizer stay as they were and ``skipped`` grows by one.

    Raises:
      ValueError: where rows do not divide into ``accumulate`` slices, or rows
        and teachers do not fit together.
    """
    layout = loss_layout() if layout is None else layout
    parts = rows_by_teacher(trajectories, scored, accumulate, layout)
    tokens = jnp.sum(trajectories.mask, dtype=jnp.float32)
    points = _points(scored, objective)

    def loss_fn(trained: Any, parts: Any) -> tuple[jax.Array, list[dict]]:
        student, losses, sums = join(trained, frozen), [], []
        for whole, (rows, notes) in zip(scored, parts, strict=True):
            notes = notes.replace(teacher_head=whole.head_beside(student))
            loss, logged = batch_loss(
                student, rows, notes, (tokens, points),
                objective=objective, layout=layout,
            )  # fmt: skip
            losses.append(loss)
            sums.append(logged)
        return functools.reduce(jnp.add, losses), sums

    (loss, sums), gradients = accumulated(
        jax.value_and_grad(loss_fn, has_aux=True),
        state.student, parts, accumulate,
    )  # fmt: skip
    state, applied = apply_gradients(state, loss, gradients, optimizer)
    by_teacher = [
        _metrics(*part, logged)
        for part, logged in zip(parts, sums, strict=True)
    ]
    metrics = total_metrics(by_teacher) | by_name(
        {s.teacher: m for s, m in zip(scored, by_teacher, strict=True)}
    )
    return state, metrics | applied


def rows_by_teacher(
    trajectories: Any,
    scored: Sequence[Scored],
    accumulate: int,
    layout: Layout,
) -> tuple[tuple[Any, Scored], ...]:
    """Split a batch, and what its teachers say, by teacher.

    Args:
      trajectories: B rows, trajectories or rows of solutions.
      scored: one entry a teacher, in the order of the rows.
      accumulate: slices that the rows of each must divide into.
      layout: where rows lie on a mesh.

    Returns:
      (rows, scores without head) of every teacher.

    Raises:
      ValueError: naming the numbers that do not fit.
    """
    sizes = [s.teacher_token_loss.shape[0] for s in scored]
    if sum(sizes) != trajectories.tokens.shape[0]:
        raise ValueError(
            f"the teachers scored {' + '.join(map(str, sizes))} rows and the "
            f"trajectories have {trajectories.tokens.shape[0]}; score the "
            "same batch that is trained on"
        )
    out, begin = [], 0
    for size, notes in zip(sizes, scored, strict=True):
        if size % accumulate:
            whose = f" of teacher {notes.teacher!r}" if notes.teacher else ""
            raise ValueError(
                f"{size} rows{whose} must be divisible by "
                f"accumulate={accumulate}"
            )
        end = begin + size

        def own(x: jax.Array, rows: slice = slice(begin, end)) -> jax.Array:
            # Sliced from the batch, they lie on some of the devices only.
            return layout.constrain(x[rows], "batch", *[None] * (x.ndim - 1))

        part = (
            jax.tree.map(own, trajectories) if len(sizes) > 1 else trajectories
        )
        out.append((part, notes.replace(teacher_head=None)))
        begin = end
    return tuple(out)


def accumulated(
    grad_fn: Callable[[Any, Any], tuple[tuple[jax.Array, Any], Any]],
    trained: Any,
    batch: Any,
    slices: int,
) -> tuple[tuple[jax.Array, Any], Any]:
    """Sum loss, logged sums and gradients over slices of a batch.

    Args:
      grad_fn: (trained, batch) -> ((loss, sums), gradients).
      trained: any pytree.
      batch: pytree of arrays [B, ...].
      slices: that B divides into; each takes rows from all over the batch, so
        that it keeps the batch's spread over a mesh.

    Returns:
      What ``grad_fn`` returns, added up in float32; gradients in the types of
      ``trained``, as without slices.
    """
    if slices == 1:
        return grad_fn(trained, batch)
    batch = jax.tree.map(
        lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(total: Any, part: Any) -> tuple[Any, None]:
        found = optax.tree.cast(grad_fn(trained, part), jnp.float32)
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(
        grad_fn, trained, jax.tree.map(lambda x: x[0], batch)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (sums, gradients), _ = jax.lax.scan(body, zeros, batch)
    # Moments of another type would recompile the step and lose donation.
    return sums, optax.tree.cast_like(gradients, trained)


def apply_gradients(
    state: TrainState,
    loss: jax.Array,
    gradients: Any,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Update a state, unless the loss or the gradient is not finite.

    Args:
      state: of the step.
      loss: f32[].
      gradients: as ``state.student``.
      optimizer: of the state.

    Returns:
      (the new state, metrics loss, grad_norm and skipped).
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.student
    )
    student = optax.apply_updates(state.student, updates)
    student, opt_state = optax.tree.where(
        finite, (student, opt_state), (state.student, state.opt_state)
    )
    one = jnp.ones(())
    metrics = {
        "loss": (loss, one),
        "grad_norm": (norm, one),
        "skipped": (1.0 - finite, one),
    }
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    return TrainState(student, opt_state, state.step + 1, skipped), metrics


def _points(scored: Sequence[Scored], objective: Objective) -> jax.Array:
    """f32[]: divergent points of the whole batch, where something guides."""
    points = jnp.zeros(())
    if objective.guidance is not None:
        for notes in scored:
            points += jnp.sum(notes.divergent, dtype=jnp.float32)
    return points


def _metrics(
    trajectories: Trajectories, scored: Scored, sums: dict[str, jax.Array]
) -> Metrics:
    """Return the metrics of one teacher's rows."""
    mask = trajectories.mask
    tokens = jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.asarray(mask.shape[0], jnp.float32)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    one = jnp.ones(())
    metrics = {
        "divergence": (sums["divergence"], tokens),
        "teacher_token_loss": (jnp.sum(scored.teacher_token_loss), tokens),
        "length_mean": (jnp.sum(lengths), rows),
        "length_min": (jnp.min(lengths), one),
        "length_max": (jnp.max(lengths), one),
        "truncated": (jnp.sum(trajectories.truncated, dtype=jnp.float32), rows),
        "repetition": (repeated_tokens(trajectories.tokens, mask), tokens),
        "num_tokens": (tokens, one),
    }
    if scored.candidates is not None:
        exists = scored.candidates.mask
        count = jnp.sum(exists, dtype=jnp.float32)
        divergent = jnp.sum(scored.divergent, dtype=jnp.float32)
        distance = jnp.sum(jnp.where(exists, scored.distance, 0.0))
        metrics |= {
            "distance": (distance, count),
            "divergent": (divergent, count),
            "candidates": (count, rows),
        }
        if "guidance" in sums:
            metrics["guidance"] = (sums["guidance"], divergent)
    return metrics
