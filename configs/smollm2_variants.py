"""OPD against TOPD on SmolLM2 and GSM8K questions, from the same student.

topd sweep --config configs/smollm2_variants.py --workdir runs/smollm2_variants
    --config.data.path=gsm8k_train.jsonl
"""

from ml_collections import ConfigDict

from topd_jax.configs import smollm2_gsm8k


def get_config() -> ConfigDict:
    """The pruned pair; each variant on both seeds, on more held-out text."""
    config = smollm2_gsm8k.get_config()
    config.data.held_out = 48
    config.eval.final_problems = 48
    config.sweep.variants = (
        "opd", "topd(candidates=4, window=12)",
    )  # fmt: skip
    config.sweep.seeds = (0, 1)
    config.log.tensorboard = False
    return config
