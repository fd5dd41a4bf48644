"""A run of small models on long rollouts: too large for v5e:2x4 as it is."""

from ml_collections import ConfigDict
from small_run import small_config


def get_config() -> ConfigDict:
    """What its layers keep for the backward pass does not fit a chip."""
    config = small_config()
    config.mesh.fsdp = 8
    config.world.student_layers = 8
    config.world.student_width = 256
    config.data.batch_size = 512
    config.rollout.max_new_tokens = 1024
    config.objective = "opd"
    return config
