"""The objective of some rows: states, weights, token loss, guidance.

Everything that is differentiated is here.
"""

import jax
import jax.numpy as jnp

from topd_jax.losses.fused import fused_weighted_sum
from topd_jax.models.passes import branch_states, trajectory_states
from topd_jax.models.protocol import LanguageModel
from topd_jax.objectives.objective import Objective
from topd_jax.objectives.pieces import ask
from topd_jax.objectives.statistics import pick, token_statistics
from topd_jax.types import Layout, Scored, Trajectories


def batch_loss(
    student: LanguageModel,
    trajectories: Trajectories,
    scored: Scored,
    totals: tuple[jax.Array, jax.Array],
    *,
    objective: Objective,
    layout: Layout,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the objective of some rows over given denominators.

    L = sum_t mask w_t l_t / sum_t mask + lambda * mean over divergent points
    of L_traj (arXiv:2606.00305, §3; weights §5.1).

    Args:
      student: the model that is differentiated.
      trajectories: some rows.
      scored: what one teacher says about the same rows.
      totals: (tokens, divergent points), f32[] each, of the whole batch.
      objective: what is trained on.
      layout: of the fused losses.

    Returns:
      (loss f32[], sums to log: "divergence" over tokens, "guidance" over
      divergent points).
    """
    along = None
    if objective.trains_on_branch:
        hidden, along = branch_states(
            student, trajectories, scored.candidates, scored.teacher_windows
        )
    else:
        hidden = trajectory_states(student, trajectories)
    mask, weights = trajectories.mask, trajectories.mask.astype(jnp.float32)
    arrays = (hidden, student.head, scored.teacher_hidden, scored.teacher_head)
    rows = {"tokens": trajectories.tokens, "uniforms": scored.uniforms}
    offered = vars(scored) | {
        "mask": mask,
        "tokens": trajectories.tokens,
        "student_hidden": hidden,
        "student_head": student.head,
        "branch_hidden": along,
        "vocab_size": min(arrays[1].shape[0], arrays[3].shape[0]),
        "layout": layout,
    }
    if objective.compares(objective.row_weights):
        # A pass without gradient: the weights need the statistics first.
        offered |= token_statistics(
            objective.compares(objective.row_weights), *arrays, rows,
            layout=layout, extra=objective.statistics,
            token_loss=objective.token_loss,
            temperature=objective.temperature,
        )  # fmt: skip
    if scored.weights is not None:
        weights *= scored.weights
    for weight in objective.row_weights:
        own = jnp.where(mask, ask(weight, offered), 0.0)
        weights *= jax.lax.stop_gradient(own)
    loss, sums = jnp.zeros(()), {}
    if objective.guidance is not None:
        per_point = ask(objective.guidance.loss, offered)
        guided = jnp.sum(jnp.where(scored.divergent, per_point, 0.0))
        loss = objective.guidance.weight * guided / jnp.maximum(totals[1], 1.0)
        sums["guidance"] = guided
    needed = pick(objective.token_loss, rows)
    total, token_loss = fused_weighted_sum(
        *arrays, weights, objective.token_loss, rows=needed,
        temperature=objective.temperature, layout=layout,
    )  # fmt: skip
    sums["divergence"] = jnp.sum(jnp.where(mask, token_loss, 0.0))
    return loss + total / jnp.maximum(totals[0], 1.0), sums
