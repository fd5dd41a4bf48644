"""The student as its own teacher, which sees more: what tames pivot tokens?

The teacher is the initial student, which also reads a correct solution's first
step; --config.teacher.source=student makes it the student of every step. A few
tokens then carry most of the gradient: plain distillation in both directions,
each id's term of the KL clipped, and near-future guidance.

topd sweep --config tiny_privileged --workdir runs/privileged
"""

from ml_collections import ConfigDict

from topd_jax.configs import tiny
from topd_jax.objectives.loading import spell


def get_config() -> ConfigDict:
    """The tiny world; the remedies on three seeds."""
    config = tiny.get_config()
    config.teacher.source = "world:student"
    config.teacher.unroll = config.student.unroll
    config.teacher.prompt = "{question}{hint}"
    config.data.max_teacher_prompt_length = 32
    config.sweep.variants = (
        "opd",
        spell("opd", token_loss="forward_kl"),
        spell("opd", token_loss="clipped_reverse_kl"),
        spell("opd", token_loss="clipped_forward_kl"),
        spell("topd", guidance_weight=0.3),
    )
    config.sweep.seeds = (0, 1, 2)
    config.log.tensorboard = False
    return config
