"""Qwen3-8B teaches Qwen3-1.7B on one host of eight v5e chips (v5e:2x4).

topd plan --config qwen3_8b_to_1p7b --topology v5e:2x4 shows memory and time.
The prompts: --config.data.path=FILE, a JSONL file with "question" and
"answer". All numbers are ours; the method's are those of the paper where it
names one.
"""

from ml_collections import ConfigDict

from topd_jax.configs import default
from topd_jax.objectives.loading import spell


def get_config() -> ConfigDict:
    """Rollouts of 1024 tokens, eight prompts a step, a chip each."""
    config = default.get_config()

    config.student.source = "Qwen/Qwen3-1.7B"
    config.student.dtype = "bfloat16"
    config.student.remat = "full"
    config.student.attention = "flash"  # ours
    config.teacher.source = "Qwen/Qwen3-8B"
    config.teacher.dtype = "bfloat16"
    config.teacher.param_dtype = "bfloat16"
    config.teacher.attention = "flash"  # ours

    config.data.source = "jsonl"
    config.data.batch_size = 8
    config.data.samples = 4  # paper, App. B
    config.data.max_prompt_length = 256
    config.data.on_long_prompt = "skip"
    config.data.held_out = 256  # all that eval.final_problems asks for
    config.rollout.max_new_tokens = 1024
    config.rollout.sharding = "tensor"  # decoding 16 times shorter (ours)

    config.objective = spell(
        "topd",
        candidates=24,  # paper, 2.1: 0.0225 of the tokens
        fraction=0.0225,  # paper, section 2.1
        window=50,  # paper, sections 2.1 and 3
    )
    config.rollout.branch_sharding = "rows"  # no parameter is gathered (ours)

    config.optimizer.learning_rate = 2e-6  # paper, App. B
    config.optimizer.accumulate = 4
    config.train.steps = 1000
    config.log.statistics_every = 50
    config.eval.every = 100
    config.eval.problems = 64
    config.eval.final_problems = 256
    config.eval.batch_size = 64
    config.checkpoint.every = 100
    return config
