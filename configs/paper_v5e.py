"""The paper's pair and stage 2 on 16 chips of v5e:4x4.

topd plan --config paper_v5e --topology v5e:4x4 shows memory and time. As in
configs/paper.py but for 4 prompts a step in the place of one, each on chips of
its own: the global batch is 4 times the paper's (ours).
"""

from ml_collections import ConfigDict

from topd_jax.configs import paper

PROMPTS = 4  # a step


def get_config() -> ConfigDict:
    """The mesh that is chosen: heads over 4 devices, prompts over 4."""
    config = paper.get_config()
    # Its 8 kv heads do not divide among 16 chips, as "tensor" would have them.
    config.rollout.sharding = "rows"
    config.data.batch_size = PROMPTS
    config.train.steps = paper.PROMPTS // PROMPTS
    return config
