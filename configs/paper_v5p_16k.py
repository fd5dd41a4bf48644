"""The paper's pair and stage 2 with rollouts of 16k tokens, on v5p:2x2x1.

topd plan --config paper_v5p_16k --topology v5p:2x2x1 shows memory and time. As
in configs/paper_v5p.py but for the length; the candidates are still 218 a row,
the likeliest forks of a longer rollout (ours).
"""

from ml_collections import ConfigDict

from topd_jax.configs import paper_v5p


def get_config() -> ConfigDict:
    """Rollouts of 16384 tokens; a trajectory at a time in the update."""
    config = paper_v5p.get_config()
    config.rollout.max_new_tokens = 16_384
    config.eval.batch_size = 4  # a problem in the place of four
    return config
