"""Every variant on three seeds of the tiny world, resumable run by run.

Each finished run appends one line to the record, which is committed and feeds
the README's table: topd sweep --config configs/tiny_variants.py
--workdir runs/tiny, started from the checkout.
"""

from ml_collections import ConfigDict
from topd_jax.configs import tiny


def get_config() -> ConfigDict:
    """The tiny world; only what is swept differs."""
    config = tiny.get_config()
    config.sweep.variants = (
        "opd",
        "opd+suppress",
        "opd+suppress_control",
        "n_step",
        "topd:teacher",
        "topd:student",
    )
    config.sweep.seeds = (0, 1, 2)
    config.sweep.record = "notebooks/results/tiny.jsonl"
    return config
