"""When does the near future pay? Tiny worlds by how sure the student errs.

A student that reads more of its problems without precedence gives less
probability to the right token at a fork. Each objective trains in each of
these worlds, seed by seed, so that an unfinished sweep already has a table:

topd sweep --config configs/tiny_certainty.py --workdir runs/certainty
"""

from ml_collections import ConfigDict

from topd_jax.configs import tiny
from topd_jax.objectives.loading import spell

TOPD = {"guidance_weight": 0.3}

VARIANTS = (
    "opd",
    # What the time of guided runs buys on two quiet cores: of all steps, or of
    # a quarter.
    "opd;train.steps=405",
    "opd;train.steps=325",
    spell("topd", **TOPD),
    spell("topd", **TOPD, context="student"),
    # Does detection matter? By a free score, not at all, not even the ranking.
    spell("topd", **TOPD, detector="future_loss"),
    spell("topd", **TOPD, detector="future_loss", window=5),
    tiny.EARLY,
    spell("topd", **TOPD, percentile=0.0),
    spell(
        "topd",
        **TOPD,
        ranking="random",
        candidates=1,
        branch_fraction=1.0,
        detector="future_loss",
        percentile=0.0,
    ),
    # Without a look ahead.
    spell("opd", token_loss="jsd"),
    spell("opd", token_loss="forward_kl"),
    spell("opd", token_loss="forward_kl_at_high_loss"),
    "n_step",
    # Controls.
    "suppress_unlikely",
    spell("retain", fraction=0.5),
)


def get_config() -> ConfigDict:
    """The tiny world; what is swept, and the student's certainty."""
    config = tiny.get_config()
    config.sweep.variants = VARIANTS
    config.sweep.worlds = tuple(
        f"world.student_left_to_right={share}"
        for share in (0.5, 0.8, 0.95, 0.99, 1.0)
    )
    config.sweep.seeds = (0, 1, 2, 3, 4)
    config.log.tensorboard = False
    return config
