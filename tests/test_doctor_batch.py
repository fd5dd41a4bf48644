"""The preflight's second stage: what models do with one small batch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_hub
from small_files import make
from small_hub import CONFIG, IDS, copier, hub_directory

from topd_jax.cli.doctor import batch, examine
from topd_jax.cli.doctor.findings import Finding
from topd_jax.models.settings import ModelSettings
from topd_jax.training.setup import load_setup


def loaded(tmp_path, student, teacher, **changes):
    """(settings, setup) of two models with the small tokenizer."""
    paths = [
        hub_directory(tmp_path / name, model=model, ends=[1])
        for name, model in (("student", student), ("teacher", teacher))
    ]
    settings = small_hub.settings(tmp_path, *paths, **changes)
    return settings, load_setup(settings, tmp_path)


def scored(settings, setup):
    with jax.set_mesh(setup.mesh):
        return batch.score(settings, setup, setup.teachers[0])


def test_models_that_fit_are_scored(tmp_path):
    """By a window longer than what is written here."""
    seen = scored(*loaded(
        tmp_path, copier(7.0), copier(10.0), rollout__max_new_tokens=40,
        objective="topd(window=40, candidates=35)",
    ))  # fmt: skip
    assert [f.level for f in batch.judged(seen)] == ["ok", "ok"]
    assert seen.itself == pytest.approx(0, abs=1e-6)
    assert 0.01 < seen.reverse_kl < 5
    assert seen.prompt_nll < 0.6 * np.log(IDS)
    assert seen.not_finite == ()


def test_the_dtypes_of_a_run_bound_its_loss(tmp_path):
    seen = scored(*loaded(
        tmp_path, make(CONFIG), copier(10.0), teacher__dtype="bfloat16",
        teacher__param_dtype="bfloat16",
    ))  # fmt: skip
    assert 1e-6 < seen.itself < seen.rounding == 0.1


def test_every_teacher_is_looked_at(tmp_path):
    """One's files look right, and are those of another vocabulary."""
    paths = {
        name: hub_directory(tmp_path / name, model=model, ends=[1])
        for name, model in (
            ("student", copier(7.0)), ("good", copier(10.0)),
            ("other", copier(8.0, shuffled=True)),
        )
    }  # fmt: skip
    settings = small_hub.settings(tmp_path, paths["student"], paths["good"])
    file = tmp_path / "questions.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    file.write_text("".join(
        json.dumps(row | {"who": ["good", "other"][i % 2]}) + "\n"
        for i, row in enumerate(rows)
    ))  # fmt: skip
    teachers = {
        name: dataclasses.replace(settings.teacher, source=paths[name])
        for name in ("good", "other")
    }
    data = dataclasses.replace(settings.data, teacher_field="who")
    settings = dataclasses.replace(
        settings, teacher=ModelSettings(), teachers=teachers, data=data
    )
    found = {f.name: f for f in examine.examine(settings, tmp_path)[0]}
    assert found["one batch (good)"].level == "ok"
    other = found["one batch (other)"]
    assert other.level == "warning"
    assert other.text.startswith("prompts and completions are noise")
    assert "compare the teacher's tokenizer files" in other.way_out


GOOD = batch.Scores(
    itself=0.0, reverse_kl=1.0, teacher_nll=2.0, prompt_nll=2.0,
    uniform=np.log(IDS), rounding=1e-3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "level", "text"),
    [
        ({}, None, None, None),
        ({"itself": 0.02}, "student == teacher", "error", "loss 0.02 nats"),
        ({"itself": np.nan}, "student == teacher", "error", "nan"),
        ({"reverse_kl": np.inf}, "one batch", "error", "not finite"),
        ({"reverse_kl": 1e-6}, "one batch", "warning", "already says"),
        ({"teacher_nll": 5.5}, "one batch", "warning", "student writes is no"),
        ({"teacher_nll": 5.5, "prompt_nll": 5.5}, "one batch", "warning",
         "prompts and completions are noise"),
    ],
)  # fmt: skip
def test_what_scores_mean(changes, name, level, text):
    rest = [f for f in batch.judged(GOOD._replace(**changes))
            if f.level != "ok"]  # fmt: skip
    assert [(f.name, f.level) for f in rest] == [(name, level)] * bool(name)
    assert all(text in f.text and f.way_out for f in rest)


def test_the_kernels_that_a_config_asks_for_are_compared(tmp_path, monkeypatch):
    settings, setup = loaded(
        tmp_path, copier(6.0), copier(10.0), teacher__attention="flash"
    )
    asked = []

    def kernels(models):
        asked.append({n: m.config.attention for n, m in models.items()})
        return [Finding("error", "attention", "wrong", "take blocks")]

    monkeypatch.setattr(examine, "kernels", kernels)
    (found,) = examine.examine_setup(settings, setup)
    assert asked == [{"student": "blocks", "teacher": "flash"}]
    assert found.text == "wrong"


def test_in_stage_1_a_student_may_write_noise():
    """It begins with the teacher's own texts, as the way out would say."""
    noise = GOOD._replace(teacher_nll=5.5)
    assert [f.level for f in batch.judged(noise, offline=True)] == ["ok"] * 2
    (_, found) = batch.judged(noise._replace(prompt_nll=5.5), offline=True)
    assert found.level == "warning" and "tokenizer files" in found.way_out
