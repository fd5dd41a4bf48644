"""Guidance at divergent points, in the two contexts of the paper.

The formulas are in :mod:`topd_jax.losses.trajectory`; here they become pieces
of an objective.
"""

import dataclasses

import jax

from topd_jax.losses import trajectory
from topd_jax.losses.divergences import forward_kl, reverse_kl
from topd_jax.losses.fused import fused_divergence, fused_token_logprobs
from topd_jax.objectives.pieces import Bounded
from topd_jax.settings import setting
from topd_jax.types import Candidates, Head, Layout, Windows


@dataclasses.dataclass(frozen=True)
class PlanTargets(Bounded):
    """Train the rollout's own contexts on the transport plan's targets (§3)."""

    anchor_first: bool = setting(
        True, "the first target is the teacher's first token"
    )

    def __call__(
        self,
        student_hidden: jax.Array,
        student_head: Head,
        candidates: Candidates,
        student_windows: Windows,
        teacher_windows: Windows,
        plan: jax.Array,
        vocab_size: int,
        layout: Layout,
    ) -> jax.Array:
        """Compute the KL of each candidate's targets, f32[B, M]."""
        logp = trajectory.student_context_logprobs(
            student_hidden,
            student_head,
            candidates,
            teacher_windows,
            vocab_size=vocab_size,
            layout=layout,
        )
        targets = trajectory.trajectory_targets(
            plan,
            teacher_windows,
            student_windows,
            anchor_first=self.anchor_first,
        )
        return trajectory.trajectory_loss(targets, logp, teacher_windows)


def branch_cross_entropy(
    branch_hidden: jax.Array,
    student_head: Head,
    teacher_windows: Windows,
    vocab_size: int,
    layout: Layout,
) -> jax.Array:
    """Train along the teacher's branch on its tokens (§5.2), f32[B, M]."""
    logp = fused_token_logprobs(
        branch_hidden,
        student_head,
        teacher_windows.tokens,
        vocab_size=vocab_size,
        layout=layout,
    )
    return trajectory.window_mean(-logp, teacher_windows.mask)


@dataclasses.dataclass(frozen=True)
class BranchDivergence(Bounded):
    """Train along the teacher's branch on its whole distributions."""

    divergence: str = setting(
        "forward_kl", "along the branch", choices=("forward_kl", "reverse_kl")
    )

    def __call__(
        self,
        branch_hidden: jax.Array,
        student_head: Head,
        teacher_window_hidden: jax.Array,
        teacher_head: Head,
        teacher_windows: Windows,
        vocab_size: int,
        layout: Layout,
    ) -> jax.Array:
        """Compute the mean divergence along each branch, f32[B, M]."""
        loss = forward_kl if self.divergence == "forward_kl" else reverse_kl
        values = fused_divergence(
            branch_hidden,
            student_head,
            teacher_window_hidden,
            teacher_head,
            loss,
            vocab_size=vocab_size,
            layout=layout,
        )
        return trajectory.window_mean(values, teacher_windows.mask)


BRANCH_LOSSES = {
    "cross_entropy": branch_cross_entropy,
    "forward_kl": BranchDivergence("forward_kl"),
    "reverse_kl": BranchDivergence("reverse_kl"),
}
