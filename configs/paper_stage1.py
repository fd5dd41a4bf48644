"""The paper's first stage to the letter: the teacher writes, the student reads.

Twice the same file: the teacher's solutions, then the student on them.

    topd generate --config configs/paper_stage1.py --workdir runs/solutions \
        --config.data.path=FILE
    topd train --config configs/paper_stage1.py --workdir runs/stage1 \
        --config.data.path=FILE --config.offline.path=runs/solutions

The pair and the optimiser's betas, clip and end are those of the second stage.
A solution longer than a row with its prompt is cut off at the row's end. Four
chips of v5p hold the caches of 64 rows that the teacher writes, not of 128.
"""

from ml_collections import ConfigDict

from topd_jax.configs import paper

PROMPTS = 20_000  # App. B


def get_config() -> ConfigDict:
    """What differs from the second stage (arXiv:2606.00305, App. B)."""
    config = paper.get_config()
    config.train.stage = "offline"
    config.offline.kd_ratio = 0.5  # App. B: forward KL and cross-entropy

    config.offline.temperature = 0.6  # App. B
    config.offline.top_p = 0.95  # App. B
    config.rollout.max_new_tokens = 16384  # App. B
    config.data.samples = 1  # App. B: a solution a prompt

    config.data.batch_size = 128  # App. B: solutions a step
    config.rollout.slots = 64  # of them at once; ours
    config.offline.pack_length = 16384  # App. B
    config.offline.keep = "all"  # ours: App. B names no filter

    config.optimizer.learning_rate = 2e-5  # App. B
    config.optimizer.warmup_fraction = 0.05  # App. B
    # Slices of one to four rows: attention over 16384 columns is dense (ours).
    config.optimizer.accumulate = 32
    # App. B: 1 epoch; 156 steps, the 32 solutions that fill no batch left out.
    config.train.steps = PROMPTS // config.data.batch_size

    # Ours. Statistics would read all rows of a step at once.
    config.log.statistics_every = 0
    config.eval.every = 40
    config.checkpoint.every = 20
    return config
