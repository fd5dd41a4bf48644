"""The paper's pair and stage 2 on 4 chips (8 devices) of TPU7x:2x2x1.

topd plan --config paper_tpu7x --topology TPU7x:2x2x1 shows memory and time. As
in configs/paper.py but for 2 prompts a step in the place of one, each on chips
of its own: the global batch is 2 times the paper's (ours).
"""

from ml_collections import ConfigDict

from topd_jax.configs import paper

PROMPTS = 2  # a step


def get_config() -> ConfigDict:
    """The mesh that is chosen: heads over 4 devices, prompts over 2."""
    config = paper.get_config()
    config.rollout.sharding = "tensor"  # no parameter is gathered (ours)
    config.data.batch_size = PROMPTS
    config.train.steps = paper.PROMPTS // PROMPTS
    return config
