"""The paper's configurations, number by number (arXiv:2606.00305)."""

import pytest

from topd_jax.configs import paper, paper_stage1
from topd_jax.objectives.guidance import PlanTargets
from topd_jax.objectives.loading import make_objective, parse
from topd_jax.training.config import settings_from

# Of both stages: App. B, and the paper's trainer.
OPTIMIZER = {
    "optimizer.warmup_fraction": 0.05,
    "optimizer.clip": 1.0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "optimizer.weight_decay": 0.0,
    "optimizer.end_learning_rate": 1e-8,
}
PAIR = {
    "student.source": "Qwen/Qwen3-4B-Instruct-2507",
    "teacher.source": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "student.dtype": "bfloat16",
    "teacher.dtype": "bfloat16",
}
STAGE_2 = OPTIMIZER | PAIR | {
    "data.samples": 4,
    "data.max_prompt_length": 800,
    "rollout.max_new_tokens": 8000,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "train.stage": "on_policy",
    "optimizer.learning_rate": 2e-6,
    "eval.samples": 5,
}  # fmt: skip
STAGE_1 = OPTIMIZER | PAIR | {
    "train.stage": "offline",
    "offline.kd_ratio": 0.5,
    "offline.temperature": 0.6,
    "offline.top_p": 0.95,
    "offline.pack_length": 16384,
    "rollout.max_new_tokens": 16384,
    "data.batch_size": 128,
    "data.samples": 1,
    "optimizer.learning_rate": 2e-5,
}  # fmt: skip
# Sections 2.1, 3 and 4, as they are spelled in the config.
OBJECTIVE = {
    "context": "student", "token_loss": "reverse_kl", "temperature": 1.0,
    "log_floor": -100.0, "ranking": "teacher_loss", "candidates": 218,
    "fraction": 0.0225, "window": 50,
    "branch_fraction": 1.0, "branch_temperature": 0.0,
    "epsilon": 0.05, "position_weight": 0.5, "percentile": 30.0,
    "guidance_weight": 0.1, "anchor_first": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "numbers"), [(paper, STAGE_2), (paper_stage1, STAGE_1)]
)
def test_a_stage_has_the_papers_numbers(config, numbers):
    settings = settings_from(config.get_config())
    for name, number in numbers.items():
        section, key = name.split(".")
        assert getattr(getattr(settings, section), key) == number, name


def test_a_stage_is_one_epoch():
    """10,000 prompts, four rollouts each; 20,000 solutions."""
    two, one = (settings_from(c.get_config()) for c in (paper, paper_stage1))
    assert two.data.batch_size * two.data.samples == 4
    assert two.train.steps * two.data.batch_size == 10_000
    seen = one.train.steps * one.data.batch_size
    assert 20_000 - one.data.batch_size < seen <= 20_000


def test_the_objective_is_the_papers():
    text = settings_from(paper.get_config()).objective
    assert parse(text) == ("topd", OBJECTIVE)
    objective = make_objective(text)
    ahead = objective.near_future
    assert (ahead.candidates, ahead.window, ahead.threshold) == (218, 50, None)
    # The example of section 2.1: 218 of 9,688 tokens.
    assert ahead.candidates / 9688 == pytest.approx(ahead.fraction, abs=5e-5)
    assert objective.guidance.loss == PlanTargets(anchor_first=True)
    assert objective.guidance.weight == 0.1
    assert objective.token_weights == ()
