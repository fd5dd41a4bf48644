"""What helps, and why: every factor of the method on five seeds.

Around the tiny world's configuration one factor is changed at a time; sibling
methods are the baselines, and plain distillation with more steps is what the
time of the others would buy. Resumable run by run; each finished run appends
one line to the record. notebooks/results/factors.jsonl has the lines of an
earlier format. With JAX_COMPILATION_CACHE_DIR=DIR
in the environment the second seed finds what the first compiled:

topd sweep --config configs/tiny_factors.py --workdir runs/factors
"""

from ml_collections import ConfigDict

from topd_jax.configs import tiny
from topd_jax.objectives.loading import spell

TOPD = {"guidance_weight": 0.3}
STUDENT = TOPD | {"context": "student"}

METHODS = (
    "opd",
    spell("topd", **TOPD),
    spell("topd", **STUDENT),
    "suppress",
    "suppress_control",
    "n_step",
    spell("topd_suppress", **TOPD),
)

# More steps for plain distillation: as long as the others take.
EQUAL_TIME = ("opd;train.steps=450", "opd;train.steps=600")

FACTORS = (
    # the cost of transport, and the repair of the literal target
    spell("topd", **TOPD, position_weight=0.0),
    spell("topd", **STUDENT, position_weight=0.0),
    spell("topd", **STUDENT, anchor_first=False),
    # weight, window, candidates, threshold
    spell("topd", guidance_weight=0.1),
    spell("topd", guidance_weight=1.0),
    spell("topd", guidance_weight=0.1, context="student"),
    spell("topd", **TOPD, window=5),
    spell("topd", **TOPD, window=20),
    spell("topd", **TOPD, candidates=1),
    spell("topd", **TOPD, candidates=6),
    spell("topd", **TOPD, percentile=0.0),
    spell("topd", **TOPD, percentile=70.0),
    spell("topd", **TOPD, ranking="token_loss"),
    # branches and the loss along them
    spell("topd", **TOPD, branch_temperature=1.0),
    spell("topd", **TOPD, branch_loss="forward_kl"),
    spell("topd", **TOPD, branch_loss="reverse_kl"),
    # n-step weights
    spell("n_step", discount=0.8),
    spell("n_step", n=5),
    spell("n_step", strength=3.0),
)

SIBLINGS = (
    spell("opd", token_loss="forward_kl"),
    spell("opd", token_loss="jsd"),
    "entropy_aware",
    "trust_region",
    "tip",
    "teachability",
    "fire",
    # Completions have 30 tokens or so: the paper's 64 would never cut.
    spell("agreement", window=16),
    "prefix",
)


def get_config() -> ConfigDict:
    """The tiny world; only what is swept differs."""
    config = tiny.get_config()
    config.sweep.variants = METHODS + EQUAL_TIME + FACTORS + SIBLINGS
    config.sweep.seeds = (0, 1, 2, 3, 4)
    config.log.tensorboard = False
    return config
