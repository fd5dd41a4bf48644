"""The paper's pair and stage 2, to the letter, on 4 chips of v5p:2x2x1.

topd plan --config paper_v5p --topology v5p:2x2x1 shows memory and time.
Rollouts of 16k and 32k tokens fit too: --config.rollout.max_new_tokens=16384 or
32768, with --config.eval.batch_size=4.
"""

from ml_collections import ConfigDict

from topd_jax.configs import paper


def get_config() -> ConfigDict:
    """One prompt a step, heads over all four chips: configs/paper.py."""
    return paper.get_config()
