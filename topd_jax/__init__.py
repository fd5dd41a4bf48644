"""Trajectory-aware on-policy distillation in JAX: the public names.

Pure functions over arrays, to be composed; see the README for ten lines that
do. Models, data, the train loop and the command line are imported from their
own modules.
"""

from topd_jax.losses.divergences import (
    cross_entropy,
    entropy,
    forward_kl,
    generalized_jsd,
    log_softmax,
    reverse_kl,
    sampled_kl,
    token_logprobs,
    top_k_reverse_kl,
    weighted_mean,
)
from topd_jax.losses.fused import (
    dropped_mass,
    fused_divergence,
    fused_map,
    fused_token_logprobs,
    fused_weighted_sum,
)
from topd_jax.losses.near_future import (
    divergence_mask,
    false_alarm_mask,
    future_loss,
    matched_control_mask,
    median_cap_weights,
    n_step_weights,
    scatter_to_tokens,
    select_candidates,
    student_windows,
)
from topd_jax.losses.optimal_transport import (
    cosine_cost,
    transport,
    uniform_marginals,
    window_distance,
)
from topd_jax.losses.trajectory import (
    student_context_logprobs,
    trajectory_loss,
    trajectory_targets,
    window_mean,
)
from topd_jax.models.protocol import LanguageModel, from_function
from topd_jax.objectives.objective import VARIANTS, Objective
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.training.step import TrainState, annotate, init_state, update
from topd_jax.types import (
    Annotations,
    Candidates,
    Prompts,
    Trajectories,
    Windows,
    completion_states,
)

__all__ = [
    "VARIANTS",
    "Annotations",
    "Candidates",
    "LanguageModel",
    "Objective",
    "Prompts",
    "TrainState",
    "Trajectories",
    "Windows",
    "annotate",
    "branch",
    "branch_columns",
    "completion_states",
    "cosine_cost",
    "cross_entropy",
    "divergence_mask",
    "dropped_mass",
    "entropy",
    "false_alarm_mask",
    "forward_kl",
    "from_function",
    "fused_divergence",
    "fused_map",
    "fused_token_logprobs",
    "fused_weighted_sum",
    "future_loss",
    "generalized_jsd",
    "init_state",
    "log_softmax",
    "matched_control_mask",
    "median_cap_weights",
    "n_step_weights",
    "reverse_kl",
    "rollout",
    "sampled_kl",
    "scatter_to_tokens",
    "select_candidates",
    "student_context_logprobs",
    "student_windows",
    "token_logprobs",
    "top_k_reverse_kl",
    "trajectory_loss",
    "trajectory_targets",
    "transport",
    "uniform_marginals",
    "update",
    "weighted_mean",
    "window_distance",
    "window_mean",
]
