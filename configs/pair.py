"""A pair of your own: two models, and questions of a JSONL file.

topd train --config pair --workdir runs/mine --config.teacher.source=TEACHER
    --config.student.source=STUDENT --config.data.path=questions.jsonl

With --config.teacher.source=student give --config.teacher.param_dtype=float32,
the student's. Sizes are for models of some billions of parameters on a few
accelerators: topd plan --config pair with the same flags tells what they need.
"""

from ml_collections import ConfigDict

from topd_jax.configs import default


def get_config() -> ConfigDict:
    """Both models whole, in bfloat16; OPD on eight questions a step."""
    config = default.get_config()
    config.student.dtype = config.teacher.dtype = "bfloat16"
    config.teacher.param_dtype = "bfloat16"
    config.student.remat = "full"

    config.data.source = "jsonl"
    config.data.batch_size = 8
    config.data.samples = 4  # paper, App. B
    config.data.max_prompt_length = 512
    config.data.on_long_prompt = "skip"
    config.rollout.max_new_tokens = 512

    config.objective = "opd"
    config.optimizer.learning_rate = 2e-6  # paper, App. B
    config.train.steps = 200
    config.log.statistics_every = 10
    config.eval.every = 50
    config.eval.problems = config.eval.final_problems = 64
    config.eval.batch_size = 32
    return config
