"""A real tokenizer and a task that is learned: objectives on chain_sum.

Teacher and student are SmolLM2-135M-Instruct after a supervised stage on
solutions by rule, the student's with a habit of real errors:

topd solve --config reasoning_stage1 --workdir runs/reasoning/right
topd solve --config reasoning_stage1 --workdir runs/reasoning/wrong --habit 0.95
topd train --config reasoning_stage1 --workdir runs/reasoning/teacher
    --config.offline.path=runs/reasoning/right
topd train --config reasoning_stage1 --workdir runs/reasoning/student
    --config.offline.path=runs/reasoning/wrong --config.train.steps=150
topd sweep --config reasoning --workdir runs/reasoning/sweep

Rerun one to resume; the sweep goes on run by run. topd eval grades a student on
the held-out problems, or on others: --config.eval.benchmarks=
"reasoning_gym:chain_sum(min_terms=5, max_terms=5, max_digits=2, seed=99999)".
For the other task give every command another --workdir, the sweep the models
(--config.teacher.source, --config.student.source), and all
--config.data.path="leg_counting(min_animals=2, max_animals=4, size=20000)"
--config.data.max_prompt_length=112 --config.rollout.max_new_tokens=128
"""

from ml_collections import ConfigDict

from topd_jax.configs import default
from topd_jax.objectives.loading import spell

# Where the commands above leave the models.
TEACHER = "runs/reasoning/teacher"
STUDENT = "runs/reasoning/student"
TOPD = {"guidance_weight": 0.3}


def get_config() -> ConfigDict:
    """The pair, the task and the sweep."""
    config = default.get_config()
    config.teacher.source = TEACHER
    config.student.source = STUDENT

    config.data.source = "reasoning_gym"
    config.data.path = (
        "chain_sum(min_terms=3, max_terms=5, max_digits=1, size=20000)"
    )
    config.data.held_out = 500
    config.data.batch_size = 8
    config.data.max_prompt_length = 72
    config.rollout.max_new_tokens = 64

    config.objective = "opd"
    config.optimizer.learning_rate = 1e-4
    config.train.steps = 30
    config.log.statistics_every = 0
    config.log.tensorboard = False
    config.eval.every = 0
    config.eval.problems = 50
    config.eval.final_problems = 100
    config.eval.batch_size = 50
    config.checkpoint.every = 30

    config.sweep.variants = (
        "opd",
        spell("opd", token_loss="jsd"),
        spell("topd", **TOPD, detector="future_loss"),
        # The paper's section 3 to the letter.
        spell("topd", **TOPD, context="student", branch_fraction=1.0),
        # Controls.
        "suppress_unlikely",
        spell("retain", fraction=0.5),
    )
    config.sweep.seeds = (0, 1, 2)
    return config
