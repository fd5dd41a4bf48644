"""Trajectory-aware on-policy distillation in JAX: the public names.

    import topd_jax as topd

Pure functions over arrays, to be composed, and what trains with them. Names
are imported from their rooms at first use.
"""

import importlib
from typing import Any

_ROOMS = {
    "types": (
        "Candidates CappedHead Head Layout Prompts Scored Teacher Trajectories "
        "Windows completion_states"
    ),
    "losses.log_probs": "entropy log_softmax token_logprobs",
    "losses.divergences": (
        "forward_kl generalized_jsd on_logits reverse_kl weighted_mean"
    ),
    "losses.estimators": "k1 k2 k3",
    "losses.fused": (
        "dropped_mass fused_divergence fused_log_normalizer "
        "fused_map fused_token_logprobs fused_weighted_sum"
    ),
    "losses.near_future": (
        "divergence_mask future_loss matched_control_mask "
        "select_candidates student_windows"
    ),
    "losses.optimal_transport": (
        "cosine_cost transport uniform_marginals window_distance"
    ),
    "losses.token_losses": (
        "TokenLoss clipped_forward_kl clipped_reverse_kl entropy_aware_kl "
        "forward_kl_at_high_loss top_k_coverage top_k_forward_kl "
        "trust_region_loss"
    ),
    "losses.token_weights": (
        "agreement_threshold agreement_weights fire_weights "
        "median_cap_weights n_step_weights prefix_weights renormalized "
        "scatter_to_tokens teachability_weights tip_weights"
    ),
    "losses.trajectory": (
        "student_context_logprobs trajectory_loss trajectory_targets "
        "window_mean"
    ),
    "objectives.objective": (
        "Detection FutureLoss Guidance NearFuture Objective Transport"
    ),
    "objectives.pieces": "describe row_wise",
    "objectives.guidance": (
        "BranchDivergence PlanTargets branch_cross_entropy"
    ),
    "objectives.presets": (
        "PRESETS agreement entropy_aware fire n_step opd prefix retain "
        "suppress suppress_control suppress_unlikely teachability tip topd "
        "topd_suppress trust_region"
    ),
    "objectives.loading": "make_objective",
    "models.protocol": "LanguageModel from_function",
    "models.passes": "branch_states trajectory_cache trajectory_states",
    "models": "load",
    "parallel.layouts": "loss_layout",
    "parallel.sharding": "make_mesh",
    "sampling": "branch branch_columns checked rollout",
    "training.score": "score",
    "training.step": "TrainState init_state train_step",
    "training.loop": "train",
}
_EXPORTS = {
    name: f"topd_jax.{room}"
    for room, names in _ROOMS.items()
    for name in names.split()
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'topd_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
