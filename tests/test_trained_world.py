"""The tiny world's models that come with the package."""

import json

import pytest

from topd_jax.cli.doctor.files import gather
from topd_jax.configs import tiny
from topd_jax.data.settings import WorldSettings
from topd_jax.data.toy_world import models
from topd_jax.training.config import settings_from
from topd_jax.training.setup import load_setup

RECORD = models.TRAINED / "accuracy.json"


def test_the_models_are_small_and_no_file_is_trained(tmp_path):
    cache = tmp_path / "world"
    paths = models.world_models(WorldSettings(), cache)[:2]
    assert all(path.parent == models.TRAINED for path in paths)
    assert not cache.exists()
    files = [f for f in models.TRAINED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 2e6


def test_a_preflight_reads_them_without_a_directory(tmp_path):
    settings = settings_from(tiny.get_config())
    errors, context = gather(settings, tmp_path / "none")
    assert errors == [] and not (tmp_path / "none").exists()
    assert all(m.tokenizer is not None for m in context.models.values())


def test_other_sizes_and_a_wish_are_trained_anew():
    assert models.comes_trained(WorldSettings(cache="x", prompts=7))
    assert not models.comes_trained(WorldSettings(student_steps=7))
    assert not models.comes_trained(WorldSettings(from_scratch=True))


def test_the_recorded_accuracy_is_true(tmp_path):
    """Greedy, on the first test problems; floats differ between machines."""
    told = json.loads(RECORD.read_text())
    config = tiny.get_config()
    config.eval.final_problems = told["problems"]
    settings = settings_from(config)
    setup = load_setup(settings, tmp_path)
    evaluate = setup.evaluator(settings).evaluate
    for name, model in (
        ("student", setup.student),
        ("teacher", setup.teachers[0].model),
    ):
        found, _ = evaluate(model, 0, final=True, temperature=0.0)
        assert found["exact_match"] == pytest.approx(told[name], abs=0.01)
