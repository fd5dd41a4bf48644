"""Stage 1: supervised training on what a teacher wrote (arXiv:2606.00305).

L = kd_ratio * forward KL + (1 - kd_ratio) * cross-entropy (App. B), over rows
of one or several solutions. The teacher reads them, and nothing looks ahead.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from topd_jax.data.packing import PackedRows
from topd_jax.data.teachers import split_rows
from topd_jax.losses.divergences import forward_kl
from topd_jax.losses.fused import fused_token_logprobs, fused_weighted_sum
from topd_jax.models.decoder import mask_for
from topd_jax.models.lora import join
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.layouts import loss_layout
from topd_jax.training.step import (
    Metrics,
    TrainState,
    accumulated,
    apply_gradients,
    rows_by_teacher,
)
from topd_jax.types import Layout, Scored, Teacher, completion_states


def row_states(model: LanguageModel, rows: PackedRows) -> jax.Array:
    """Compute the states that predict each token of rows of solutions.

    Args:
      model: any model.
      rows: B rows of L columns.

    Returns:
      [B, L - 1, D], in the coordinates of ``rows.tokens``.
    """
    hidden, _ = model(
        rows.sequence, rows.positions, mask_for(model, rows.attention_mask)
    )
    return completion_states(hidden, 1)


def read_rows(
    student: LanguageModel,
    teachers: Sequence[Teacher],
    rows: PackedRows,
    key: jax.Array | None = None,
    *,
    slices: int = 1,
    layout: Layout | None = None,
) -> tuple[Scored, ...]:
    """Let every teacher read its rows; what ``score`` is on-policy.

    Args:
      student: whose vocabulary is shared; it is not run.
      teachers: frozen models; rows are consecutive and in their order.
      rows: B rows, those of each teacher divisible by ``slices``.
      key: unused; nothing is drawn.
      slices: that the rows are read in, one after the other: attention over
        a long row is what memory goes to.
      layout: of the fused losses; None takes the mesh in use.

    Returns:
      What each teacher says about its tokens [B, L - 1], stopped.
    """
    layout = loss_layout() if layout is None else layout
    out = []
    for teacher, own in zip(teachers, split_rows(rows, teachers), strict=True):
        model = teacher.model
        vocab = min(student.head.shape[0], model.head.shape[0])

        def read(
            part: PackedRows, model: Any = model, vocab: int = vocab
        ) -> Any:
            hidden = row_states(model, part)
            logp = fused_token_logprobs(
                hidden, model.head, part.tokens,
                vocab_size=vocab, layout=layout,
            )  # fmt: skip
            return hidden, jnp.where(part.mask, -logp, 0.0)

        if slices == 1:
            hidden, loss = read(own)
        else:
            # As an update's slices: each takes rows from all over the batch.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1),
                own,
            )
            hidden, loss = jax.tree.map(
                lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]),
                jax.lax.map(read, parts),
            )
        hidden, loss = jax.lax.stop_gradient((hidden, loss))
        out.append(Scored(model.head, hidden, loss, teacher=teacher.name))
    return tuple(out)


def sft_step(
    state: TrainState,
    rows: PackedRows,
    scored: Sequence[Scored],
    frozen: Any = None,
    *,
    kd_ratio: float,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """Make one gradient step of stage 1.

    Args:
      state: donate it.
      rows: B rows.
      scored: of :func:`read_rows`, one entry a teacher.
      frozen: what of the student is not trained.
      kd_ratio: share of forward KL, 0..1.
      optimizer: of the state.
      accumulate: slices the batch is worked through in.
      layout: of the fused losses; None takes the mesh in use.

    Returns:
      (new state, metrics as name -> (sum, count); lengths and truncated are
      counted a solution).

    Raises:
      ValueError: where rows do not divide into ``accumulate`` slices, or rows
        and teachers do not fit together.
    """
    layout = loss_layout() if layout is None else layout
    tokens = jnp.sum(rows.mask, dtype=jnp.float32)
    parts = rows_by_teacher(rows, scored, accumulate, layout)

    def loss_fn(trained: Any, parts: Any) -> tuple[jax.Array, dict]:
        student, sums = join(trained, frozen), []
        for whole, (own, notes) in zip(scored, parts, strict=True):
            notes = notes.replace(teacher_head=whole.teacher_head)
            sums.append(_sums(student, own, notes, layout))
        total = {k: sum(s[k] for s in sums) for k in sums[0]}
        # What has no weight needs no backward pass.
        loss = kd_ratio * total["divergence"] if kd_ratio else 0.0
        loss += (1 - kd_ratio) * total["cross_entropy"]
        loss /= jnp.maximum(tokens, 1.0)
        return loss, jax.lax.stop_gradient(total)

    (loss, sums), gradients = accumulated(
        jax.value_and_grad(loss_fn, has_aux=True),
        state.student, parts, accumulate,
    )  # fmt: skip
    state, applied = apply_gradients(state, loss, gradients, optimizer)
    return state, _metrics(rows, sums, tokens) | applied


def _sums(
    student: LanguageModel, rows: PackedRows, scored: Scored, layout: Layout
) -> dict[str, jax.Array]:
    """Sum forward KL, cross-entropy and the teacher's loss over tokens."""
    hidden, mask = row_states(student, rows), rows.mask
    divergence, _ = fused_weighted_sum(
        hidden, student.head, scored.teacher_hidden, scored.teacher_head,
        mask.astype(jnp.float32), forward_kl, layout=layout,
    )  # fmt: skip
    logp = fused_token_logprobs(
        hidden, student.head, rows.tokens, layout=layout,
        vocab_size=min(student.head.shape[0], scored.teacher_head.shape[0]),
    )  # fmt: skip
    return {
        "divergence": divergence,
        "cross_entropy": -jnp.sum(jnp.where(mask, logp, 0.0)),
        "teacher_token_loss": jnp.sum(scored.teacher_token_loss),
    }


def _metrics(
    rows: PackedRows, sums: dict[str, jax.Array], tokens: jax.Array
) -> Metrics:
    solutions = jnp.sum(jnp.max(rows.segments, axis=1), dtype=jnp.float32)
    used = jnp.sum(rows.segments > 0, dtype=jnp.float32)
    one = jnp.ones(())
    return {name: (value, tokens) for name, value in sums.items()} | {
        "length_mean": (tokens, solutions),
        "truncated": (jnp.sum(rows.truncated, dtype=jnp.float32), solutions),
        "num_tokens": (tokens, one),
        "solutions": (solutions, one),
        "filled": (used, jnp.asarray(rows.segments.size, jnp.float32)),
    }
