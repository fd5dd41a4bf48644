"""The pure steps of on-policy distillation: annotate, then update.

1. ``sampling.rollout``: the student writes -> ``Trajectories``.
2. :func:`annotate` (no gradient): the teacher reads them once, keeps its final
   hidden states and its cache; candidates, the teacher's branches on that same
   cache, transport, masks -> ``Annotations``. The cache dies here.
3. :func:`update`: the student reads them (and, with context "teacher", the
   branches beside them), fused divergence, weights, guidance, gradient, optax.
   Of the teacher it needs only the output head.

Nothing here knows a mesh, a file or a tokenizer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from topd_jax.models.lora import join, split
from topd_jax.objectives.objective import Objective
from topd_jax.training.loss import batch_loss
from topd_jax.training.score import annotate
from topd_jax.training.teachers import by_name, split_rows
from topd_jax.types import Annotations, Head, Trajectories

__all__ = ["TrainState", "annotate", "init_state", "update"]

# What the only teacher is called inside of an update.
_ONLY = ""


@struct.dataclass
class TrainState:
    """What an update changes.

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
    """A fresh train state for a student.

    Args:
      student: the model; of one with adapters only these are kept.
      optimizer: any optax transformation.

    Returns:
      The state at step 0.
    """
    zero = jnp.zeros((), jnp.int32)
    student, _ = split(student)
    # The student is copied: update donates the state, and the caller may
    # start a second run from the same arrays.
    student = jax.tree.map(jnp.copy, student)
    state = optimizer.init(student)
    # Two zeros: one buffer cannot be donated twice.
    return TrainState(student, state, zero, jnp.copy(zero))


def update(
    state: TrainState,
    teacher_head: Head | Mapping[str, Head],
    trajectories: Trajectories,
    annotations: Annotations | Mapping[str, Annotations],
    frozen: Any = None,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """One gradient step on the objective.

    L = sum_t mask w l / sum_t mask + lambda * mean over divergent points of
    L_traj (arXiv:2606.00305, §3; weights §5.1). Both denominators are taken
    over the whole batch, all devices, accumulation slices and teachers.

    Args:
      state: donate it.
      teacher_head: [V, D_teacher]; of several teachers, name -> head.
      trajectories: B rows, B divisible by ``accumulate``.
      annotations: of the same rows; of several teachers, name -> annotations
        of its own rows, which are consecutive and in the order of the names.
      frozen: what of the student is not trained, from
        :func:`topd_jax.models.lora.split`; do not donate it. None: nothing.
      objective: see :class:`Objective`.
      optimizer: the transformation that ``state.opt_state`` belongs to.
      accumulate: slices the batch is worked through in.

    Returns:
      (new state, metrics as name -> (sum, count); of several teachers, also
      "name/teacher"). Where the loss or the gradient is not finite the
      parameters and optimizer stay as they were and ``skipped`` grows by one.

    Raises:
      ValueError: where the rows, of any teacher, do not divide into
        ``accumulate`` slices, or rows and teachers do not fit together.
    """
    heads, batch = _by_teacher(teacher_head, trajectories, annotations)
    for name, (part, _) in batch.items():
        _require_slices(part.tokens.shape[0], accumulate, name)
    notes = [n for _, n in batch.values()]
    totals = _totals(trajectories, notes, objective)

    def loss_fn(student: Any, batch: dict) -> tuple[jax.Array, dict]:
        whole = join(student, frozen)
        found = {
            name: batch_loss(whole, heads[name], *part, totals, objective)
            for name, part in batch.items()
        }
        loss = functools.reduce(jnp.add, [loss for loss, _ in found.values()])
        return loss, {name: sums for name, (_, sums) in found.items()}

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, sums), grads = grad_fn(state.student, batch)
    else:
        loss, sums, grads = _accumulated(
            grad_fn, state.student, batch, accumulate
        )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    state = _apply(state, grads, optimizer, finite)
    whole = functools.reduce(_add, sums.values())
    metrics = _metrics(trajectories, notes, whole)
    if isinstance(annotations, Mapping):
        metrics |= by_name(
            {n: _metrics(t, [a], sums[n]) for n, (t, a) in batch.items()}
        )
    one = jnp.ones(())
    metrics |= {
        "loss": (loss, one),
        "grad_norm": (norm, one),
        "skipped": (1.0 - finite, one),
    }
    return state, metrics


def _by_teacher(
    teacher_head: Head | Mapping[str, Head],
    trajectories: Trajectories,
    annotations: Annotations | Mapping[str, Annotations],
) -> tuple[dict[str, Head], dict[str, tuple[Trajectories, Annotations]]]:
    """Heads, and (trajectories, annotations), of every teacher."""
    several = isinstance(annotations, Mapping)
    if several != isinstance(teacher_head, Mapping):
        raise ValueError(
            "teacher_head and annotations must both be mappings, name -> of "
            "that teacher, or neither"
        )
    if not several:
        return {_ONLY: teacher_head}, {_ONLY: (trajectories, annotations)}
    if set(teacher_head) != set(annotations):
        raise ValueError(
            f"teacher_head is of {sorted(teacher_head)} and annotations are "
            f"of {sorted(annotations)}; they must be of the same teachers"
        )
    # Sorted: so JAX keeps a dict wherever it passes through jit.
    notes = {name: annotations[name] for name in sorted(annotations)}
    sizes = {n: a.teacher_token_loss.shape[0] for n, a in notes.items()}
    parts = split_rows(trajectories, sizes)
    return dict(teacher_head), {n: (parts[n], notes[n]) for n in notes}


def _require_slices(rows: int, accumulate: int, name: str) -> None:
    if rows % accumulate:
        whose = "" if name == _ONLY else f" of teacher {name!r}"
        raise ValueError(
            f"{rows} rows{whose} must be divisible by accumulate={accumulate}"
        )


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _sum(
    notes: Sequence[Annotations], what: Callable[[Annotations], jax.Array]
) -> jax.Array:
    """f32[]: a sum over the annotations of all teachers."""
    return functools.reduce(
        jnp.add, [jnp.sum(what(n), dtype=jnp.float32) for n in notes]
    )


def _totals(
    trajectories: Trajectories,
    notes: Sequence[Annotations],
    objective: Objective,
) -> tuple[jax.Array, jax.Array]:
    points = jnp.zeros(())
    if objective.pieces.guides:
        points = _sum(notes, lambda n: n.divergent)
    return jnp.sum(trajectories.mask, dtype=jnp.float32), points


def _accumulated(
    grad_fn: Any, student: Any, batch: Any, slices: int
) -> tuple[jax.Array, dict, Any]:
    """Sums of loss, logged sums and gradients over slices of the batch."""

    def split(x: jax.Array) -> jax.Array:
        # Every slice takes rows from all over the batch, so that each keeps
        # the batch's spread over the mesh.
        return x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, piece: Any) -> tuple[Any, None]:
        (loss, sums), grads = grad_fn(student, piece)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return _add(total, (loss, sums, grads)), None

    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(grad_fn, student, first)
    (loss, sums), grads = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32), shapes
    )
    (loss, sums, grads), _ = jax.lax.scan(body, (loss, sums, grads), batch)
    return loss, sums, grads


def _apply(
    state: TrainState,
    grads: Any,
    optimizer: optax.GradientTransformation,
    finite: jax.Array,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old)

    return TrainState(
        student=jax.tree.map(choose, student, state.student),
        opt_state=jax.tree.map(choose, opt_state, state.opt_state),
        step=state.step + 1,
        skipped=state.skipped + (1 - finite.astype(jnp.int32)),
    )


def _metrics(
    trajectories: Trajectories,
    notes: Sequence[Annotations],
    sums: dict[str, jax.Array],
) -> dict[str, tuple[jax.Array, jax.Array]]:
    mask = trajectories.mask
    tokens = jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.asarray(mask.shape[0], jnp.float32)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    one = jnp.ones(())
    metrics = {
        "divergence": (sums["divergence"], tokens),
        "teacher_token_loss": (
            _sum(notes, lambda n: n.teacher_token_loss),
            tokens,
        ),
        "length_mean": (jnp.sum(lengths), rows),
        "length_min": (jnp.min(lengths), one),
        "length_max": (jnp.max(lengths), one),
        "truncated": (jnp.sum(trajectories.truncated, dtype=jnp.float32), rows),
        "num_tokens": (tokens, one),
    }
    if notes[0].candidates is not None:
        count = _sum(notes, lambda n: n.candidates.mask)
        divergent = _sum(notes, lambda n: n.divergent)
        distance = _sum(
            notes, lambda n: jnp.where(n.candidates.mask, n.distance, 0.0)
        )
        metrics |= {
            "distance": (distance, count),
            "divergent": (divergent, count),
            "candidates": (count, rows),
        }
    if "cross_entropy" in sums:
        metrics["cross_entropy"] = (sums["cross_entropy"], tokens)
    if "guidance" in sums:
        metrics["guidance"] = (sums["guidance"], divergent)
    return metrics
