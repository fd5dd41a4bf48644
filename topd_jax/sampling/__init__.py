"""Writing text with a model: rollouts, and branches off them."""

from topd_jax.sampling.branch import branch, branch_columns
from topd_jax.sampling.prompts import bucket, pad_prompts
from topd_jax.sampling.rollout import rollout
from topd_jax.sampling.sampler import check_sampler, draw

__all__ = [
    "branch",
    "branch_columns",
    "bucket",
    "check_sampler",
    "draw",
    "pad_prompts",
    "rollout",
]
