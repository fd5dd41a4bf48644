"""The paper's pair and stage 2 on 8 chips of v6e:2x4.

topd plan --config paper_v6e --topology v6e:2x4 shows memory and time. As in
configs/paper.py but for 2 prompts a step in the place of one, each on chips of
its own: the global batch is 2 times the paper's (ours).
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
