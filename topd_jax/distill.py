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

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from topd_jax.annotate import annotate
from topd_jax.batch_loss import batch_loss
from topd_jax.head import Head
from topd_jax.models.lora import join, split
from topd_jax.objective import Objective
from topd_jax.types import Annotations, Trajectories

__all__ = ["TrainState", "annotate", "init_state", "update"]


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
    teacher_head: Head,
    trajectories: Trajectories,
    annotations: Annotations,
    frozen: Any = None,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """One gradient step on the objective.

    L = sum_t mask w l / sum_t mask + lambda * mean over divergent points of
    L_traj (arXiv:2606.00305, §3; weights §5.1). Both denominators are taken
    over the whole batch, all devices and accumulation slices.

    Args:
      state: donate it.
      teacher_head: [V, D_teacher].
      trajectories: B rows, B divisible by ``accumulate``.
      annotations: of the same rows.
      frozen: what of the student is not trained, from
        :func:`topd_jax.models.lora.split`; do not donate it. None: nothing.
      objective: see :class:`Objective`.
      optimizer: the transformation that ``state.opt_state`` belongs to.
      accumulate: slices the batch is worked through in.

    Returns:
      (new state, metrics as name -> (sum, count)). Where the loss or the
      gradient is not finite the parameters and optimizer stay as they were
      and ``skipped`` grows by one.

    Raises:
      ValueError: where the rows do not divide into ``accumulate`` slices.
    """
    rows = trajectories.tokens.shape[0]
    if rows % accumulate:
        raise ValueError(
            f"{rows} rows must be divisible by accumulate={accumulate}"
        )
    totals = _totals(trajectories, annotations, objective)

    def loss_fn(student: Any, batch: tuple) -> tuple[jax.Array, dict]:
        whole = join(student, frozen)
        return batch_loss(whole, teacher_head, *batch, totals, objective)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    batch = (trajectories, annotations)
    if accumulate == 1:
        (loss, sums), grads = grad_fn(state.student, batch)
    else:
        loss, sums, grads = _accumulated(
            grad_fn, state.student, batch, accumulate
        )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    state = _apply(state, grads, optimizer, finite)
    metrics = _metrics(trajectories, annotations, sums)
    one = jnp.ones(())
    metrics |= {
        "loss": (loss, one),
        "grad_norm": (norm, one),
        "skipped": (1.0 - finite, one),
    }
    return state, metrics


def _totals(
    trajectories: Trajectories, notes: Annotations, objective: Objective
) -> tuple[jax.Array, jax.Array]:
    points = jnp.zeros(())
    if objective.pieces.guides:
        points = jnp.sum(notes.divergent, dtype=jnp.float32)
    return jnp.sum(trajectories.mask, dtype=jnp.float32), points


def _accumulated(
    grad_fn: Any, student: Any, batch: tuple, slices: int
) -> tuple[jax.Array, dict, Any]:
    """Sums of loss, logged sums and gradients over slices of the batch."""

    def split(x: jax.Array) -> jax.Array:
        # Every slice takes rows from all over the batch, so that each keeps
        # the batch's spread over the mesh.
        return x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, piece: tuple) -> tuple[Any, None]:
        (loss, sums), grads = grad_fn(student, piece)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

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
    trajectories: Trajectories, notes: Annotations, sums: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    mask = trajectories.mask
    tokens = jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.asarray(mask.shape[0], jnp.float32)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    one = jnp.ones(())
    metrics = {
        "divergence": (sums["divergence"], tokens),
        "teacher_token_loss": (jnp.sum(notes.teacher_token_loss), tokens),
        "length_mean": (jnp.sum(lengths), rows),
        "length_min": (jnp.min(lengths), one),
        "length_max": (jnp.max(lengths), one),
        "truncated": (jnp.sum(trajectories.truncated, dtype=jnp.float32), rows),
        "num_tokens": (tokens, one),
    }
    if notes.candidates is not None:
        used = notes.candidates.mask
        count = jnp.sum(used, dtype=jnp.float32)
        metrics |= {
            "distance": (jnp.sum(jnp.where(used, notes.distance, 0.0)), count),
            "divergent": (jnp.sum(notes.divergent, dtype=jnp.float32), count),
            "candidates": (count, rows),
        }
    if "cross_entropy" in sums:
        metrics["cross_entropy"] = (sums["cross_entropy"], tokens)
    if "guidance" in sums:
        points = jnp.sum(notes.divergent, dtype=jnp.float32)
        metrics["guidance"] = (sums["guidance"], points)
    return metrics
