"""Stage 1 on written solutions: both models read packed rows.

The rows take the place of trajectories in
:func:`topd_jax.training.step.update`:
the loss, its denominator over the whole batch and the gradient are those of
stage 1 (arXiv:2606.00305, App. B), whoever laid the tokens out. Ours.
"""

from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.data.packing import PackedRows
from topd_jax.losses import fused
from topd_jax.models.decoder import mask_for
from topd_jax.objectives.objective import Objective
from topd_jax.types import Annotations, completion_states


def packed_states(model: Any, rows: PackedRows) -> jax.Array:
    """The states that predict each token of packed rows.

    Args:
      model: any decoder.
      rows: B rows of L columns.

    Returns:
      [B, L - 1, D], in the coordinates of ``rows.tokens``.
    """
    hidden, _ = model(
        rows.sequence, rows.positions, mask_for(model, rows.spans)
    )
    return completion_states(hidden, 1)


def annotate_packed(
    student: Any,
    teacher: Any,
    rows: PackedRows,
    *,
    objective: Objective,
    slices: int = 1,
) -> Annotations:
    """Lets the teacher read packed rows; nothing looks ahead.

    Args:
      student: whose vocabulary is shared; it is not run.
      teacher: the frozen model.
      rows: B rows, B divisible by ``slices``.
      objective: for its chunk size.
      slices: that the rows are read in, one after the other: attention over
        a long row is what memory goes to.

    Returns:
      Annotations of ``rows.tokens``, all of them stopped.
    """
    vocab = min(student.head.shape[0], teacher.head.shape[0])

    def read(part: PackedRows) -> Annotations:
        hidden = packed_states(teacher, part)
        logp = fused.fused_token_logprobs(
            hidden,
            teacher.head,
            part.tokens,
            vocab_size=vocab,
            chunk_size=objective.chunk_size,
        )
        return Annotations(hidden, jnp.where(part.mask, -logp, 0.0))

    if slices == 1:
        return jax.lax.stop_gradient(read(rows))
    # As an update's slices: each takes rows from all over the batch.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1), rows
    )
    notes = jax.lax.map(read, parts)
    return jax.lax.stop_gradient(
        jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), notes
        )
    )


def packed_metrics(
    rows: PackedRows, metrics: dict[str, tuple[jax.Array, jax.Array]]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """An update's metrics, counted a solution instead of a row.

    Args:
      rows: of the step.
      metrics: what :func:`topd_jax.training.step.update` says of them.

    Returns:
      The same, name -> (sum, count), with length_mean (tokens of a
      completion) and truncated a solution, the number of solutions, and
      filled, the share of columns that hold a token; the shortest and longest
      row are left out.
    """
    solutions = jnp.sum(jnp.max(rows.segments, axis=1), dtype=jnp.float32)
    used = jnp.sum(rows.segments > 0, dtype=jnp.float32)
    columns = jnp.asarray(rows.segments.size, jnp.float32)
    kept = {
        name: value
        for name, value in metrics.items()
        if name not in ("length_min", "length_max")
    }
    return kept | {
        "length_mean": (metrics["length_mean"][0], solutions),
        "truncated": (metrics["truncated"][0], solutions),
        "solutions": (solutions, jnp.ones(())),
        "filled": (used, columns),
    }
