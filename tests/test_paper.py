"""The paper's configurations, number by number."""

import pytest

from topd_jax.configs import paper, paper_stage1
from topd_jax.objectives.objective import VARIANTS
from topd_jax.training.config import Settings, settings_from

# As METHOD has them, arXiv:2606.00305: App. B, sections 2.1, 3 and 4.
STAGE_2 = {
    "student.source": "Qwen/Qwen3-4B-Instruct-2507",
    "teacher.source": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "student.dtype": "bfloat16",
    "teacher.dtype": "bfloat16",
    "data.samples": 4,
    "data.max_prompt_length": 800,
    "rollout.max_new_tokens": 8000,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "objective.stage": "on_policy",
    "objective.variant": "topd",
    "objective.context": "student",
    "objective.divergence": "reverse_kl",
    "objective.temperature": 1.0,
    "objective.log_floor": -100.0,
    "objective.score": "teacher_loss",
    "objective.candidates": 218,
    "objective.fraction": 0.0225,
    "objective.window": 50,
    "objective.branch_temperature": 0.0,
    "objective.epsilon": 0.05,
    "objective.position_weight": 0.5,
    "objective.percentile": 30.0,
    "objective.threshold": None,
    "objective.guidance_weight": 0.1,
    "objective.anchor_first": True,
    "optimizer.learning_rate": 2e-6,
    "optimizer.warmup_fraction": 0.05,
    "optimizer.clip": 1.0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "optimizer.weight_decay": 0.0,
    "optimizer.end_learning_rate": 1e-8,
    "eval.samples": 5,
}
# App. B, stage 1.
STAGE_1 = {
    "student.source": "Qwen/Qwen3-4B-Instruct-2507",
    "teacher.source": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "student.dtype": "bfloat16",
    "objective.stage": "offline",
    "objective.kd_ratio": 0.5,
    "offline.temperature": 0.6,
    "offline.top_p": 0.95,
    "offline.pack_length": 16384,
    "rollout.max_new_tokens": 16384,
    "data.batch_size": 128,
    "data.samples": 1,
    "optimizer.learning_rate": 2e-5,
    "optimizer.warmup_fraction": 0.05,
    "optimizer.clip": 1.0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "optimizer.weight_decay": 0.0,
    "optimizer.end_learning_rate": 1e-8,
}


def value(settings: Settings, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


@pytest.mark.parametrize("name", STAGE_2)
def test_stage_2_has_the_papers_number(name):
    settings = settings_from(paper.get_config())
    assert value(settings, name) == STAGE_2[name]


def test_stage_2_is_one_epoch_of_ten_thousand_prompts_in_fours():
    settings = settings_from(paper.get_config())
    assert settings.data.batch_size * settings.data.samples == 4
    assert settings.train.steps * settings.data.batch_size == 10_000


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_has_the_papers_number(name):
    settings = settings_from(paper_stage1.get_config())
    assert value(settings, name) == STAGE_1[name]


def test_stage_1_is_one_epoch_of_twenty_thousand_solutions():
    settings = settings_from(paper_stage1.get_config())
    seen = settings.train.steps * settings.data.batch_size
    assert 20_000 - settings.data.batch_size < seen <= 20_000


def test_the_share_of_candidates_is_the_papers_example():
    settings = settings_from(paper.get_config())
    share = settings.objective.candidates / 9688
    assert share == pytest.approx(settings.objective.fraction, abs=5e-5)
    assert VARIANTS[settings.objective.variant].guides
