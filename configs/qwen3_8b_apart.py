"""qwen3_8b_to_1p7b with the teacher on four of the eight chips.

topd plan --config qwen3_8b_apart --topology v5e:2x4 shows memory and time. The
teacher's heads and columns are spread over its four chips, so that its branches
gather no parameters. All numbers are ours.
"""

from ml_collections import ConfigDict

from topd_jax.configs import qwen3_8b_to_1p7b


def get_config() -> ConfigDict:
    """The student on the first four chips, two parts a step."""
    config = qwen3_8b_to_1p7b.get_config()
    config.mesh.fsdp = 4
    config.teacher_mesh.devices = 4
    config.teacher_mesh.tensor = 4
    config.teacher_mesh.parts = 2
    config.objective.branch_sharding = "train"  # nothing is over fsdp there
    return config
