"""What helps, and why: every factor of the method on five seeds.

Around the tiny world's configuration one factor is changed at a time; sibling
methods are the baselines, and plain distillation with more steps is what the
time of the others would buy. Resumable run by run; each finished run appends
one line to the record, which is committed. With JAX_COMPILATION_CACHE_DIR=DIR
in the environment the second seed finds what the first compiled:

topd sweep --config configs/tiny_factors.py --workdir runs/factors
"""

from ml_collections import ConfigDict

from topd_jax.configs import tiny

METHODS = (
    "opd",
    "topd:teacher",
    "topd:student",
    "opd+suppress",
    "opd+suppress_control",
    "n_step",
    "topd+suppress:teacher",
)

# More steps for plain distillation: as long as the others take.
EQUAL_TIME = ("opd/train.steps=450", "opd/train.steps=600")

FACTORS = (
    # the cost of transport, and the repair of the literal target
    "topd:teacher/position_weight=0.0",
    "topd:student/position_weight=0.0",
    "topd:student/anchor_first=False",
    # weight, window, candidates, threshold
    "topd:teacher/guidance_weight=0.1",
    "topd:teacher/guidance_weight=1.0",
    "topd:student/guidance_weight=0.1",
    "topd:teacher/window=5",
    "topd:teacher/window=20",
    "topd:teacher/candidates=1",
    "topd:teacher/candidates=6",
    "topd:teacher/percentile=0.0",
    "topd:teacher/percentile=70.0",
    "topd:teacher/score=reverse_kl",
    # branches and the loss along them
    "topd:teacher/branch_temperature=1.0",
    "topd:teacher/branch_loss=forward_kl",
    "topd:teacher/branch_loss=reverse_kl",
    # n-step weights
    "n_step/discount=0.8",
    "n_step/n_step=5",
    "n_step/strength=3.0",
)

SIBLINGS = (
    "opd/divergence=forward_kl",
    "opd/divergence=jsd",
    "entropy_aware",
    "trust_region",
    "tip",
    "teachability",
    "fire",
    # Completions have 30 tokens or so: the paper's 64 would never cut.
    "agreement/siblings.window=16",
    "prefix",
)


def get_config() -> ConfigDict:
    """The tiny world; only what is swept differs."""
    config = tiny.get_config()
    config.sweep.variants = METHODS + EQUAL_TIME + FACTORS + SIBLINGS
    config.sweep.seeds = (0, 1, 2, 3, 4)
    config.sweep.record = "notebooks/results/factors.jsonl"
    config.log.tensorboard = False
    return config
