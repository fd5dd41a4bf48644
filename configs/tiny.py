"""The tiny world: a few minutes on two cores, and the truth is known."""

from ml_collections import ConfigDict

from topd_jax.configs import default
from topd_jax.objectives.loading import spell

# Guidance of the first quarter of a run. Chosen in two other worlds
# (world.student_left_to_right of 0.97 and 0.995, seeds 10 to 12), of shares of
# 0.125 to 1 and weights of 0.3 to 1; see notebooks/results/README.md.
EARLY = spell(
    "topd", guidance_weight=0.6, guidance_share=0.25, detector="future_loss"
)


def get_config() -> ConfigDict:
    """Arithmetic with surface forms and real errors, small models."""
    config = default.get_config()
    # Small stacks are faster unrolled than scanned on a CPU.
    config.student.unroll = 2
    config.teacher.unroll = 3
    # Chosen on the validation split, seed 0, of 3e-4 and 1e-3 for OPD.
    config.optimizer.learning_rate = 1e-3
    config.objective = EARLY
    config.sweep.variants = (
        "opd",
        EARLY,
        "topd(context='student', guidance_weight=0.3)",
    )
    return config
