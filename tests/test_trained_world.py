"""The tiny world's models that come with the package."""

import dataclasses
import json

import pytest

from topd_jax.cli.doctor.files import gather
from topd_jax.configs import tiny
from topd_jax.data.settings import WorldSettings
from topd_jax.data.toy_world import models
from topd_jax.training.config import settings_from
from topd_jax.training.setup import load_setup

TOLD = json.loads((models.TRAINED / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def settings():
    """The defaults, with few prompts: to draw these takes seconds."""
    config = tiny.get_config()
    config.world.prompts = config.data.batch_size
    config.eval.final_problems = TOLD["problems"]
    return settings_from(config)


def test_the_models_are_small_and_no_file_is_trained(settings, tmp_path):
    """A preflight reads them without a directory."""
    cache = tmp_path / "world"
    paths = models.world_models(WorldSettings(), cache)[:2]
    assert all(path.parent == models.TRAINED for path in paths)
    errors, context = gather(settings, tmp_path / "none")
    assert errors == [] and not list(tmp_path.iterdir())
    assert all(m.tokenizer is not None for m in context.models.values())
    files = [f for f in models.TRAINED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 2e6
    # Other sizes and a wish are trained anew.
    assert models.comes_trained(WorldSettings(cache="x", prompts=7))
    assert not models.comes_trained(WorldSettings(student_steps=7))
    assert not models.comes_trained(WorldSettings(from_scratch=True))


def test_the_recorded_accuracy_is_true(settings, tmp_path):
    """Greedy, on the first test problems; floats differ between machines."""
    setup = load_setup(settings, tmp_path)
    # Nothing is compared, which takes seconds to compile.
    evaluator = dataclasses.replace(setup.evaluator(settings), teachers=())
    for name, model in (
        ("student", setup.student),
        ("teacher", setup.teachers[0].model),
    ):
        found, _ = evaluator.evaluate(model, 0, final=True, temperature=0.0)
        assert found["exact_match"] == pytest.approx(TOLD[name], abs=0.01)
