"""The preflight's second stage: what models do with one small batch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_hub
from conftest import make_trajectories
from small_files import make
from small_hub import CONFIG, END, IDS, STOP, copier, hub_directory

from topd_jax.cli.doctor import examine, scored, verdicts
from topd_jax.cli.doctor.findings import error
from topd_jax.training.setup import load_pair


def named(found, name):
    """The findings of a name: (level, text, way out)."""
    return [(f.level, f.text, f.way_out) for f in found if f.name == name]


def scored_pair(tmp_path, student, teacher, **changes):
    """(settings, pair) of two models with the small tokenizer."""
    paths = [
        hub_directory(tmp_path / name, model=model, ends=[1])
        for name, model in (("student", student), ("teacher", teacher))
    ]
    settings = small_hub.settings(tmp_path, *paths, **changes)
    return settings, load_pair(settings, tmp_path)


def test_a_pair_that_fits_is_scored(tmp_path):
    settings, pair = scored_pair(tmp_path, copier(6.0), copier(10.0))
    with jax.set_mesh(pair.mesh):
        scores = scored.score(settings, pair)
    found = verdicts.judge(scores, settings, pair)
    # Whether a completion ended is drawn.
    assert {f.name for f in found if f.level != "ok"} <= {"completions"}
    assert scores.itself == pytest.approx(0, abs=1e-6)
    assert scores.sampler == pytest.approx(0, abs=1e-4)
    assert 0.01 < scores.reverse_kl < 5
    assert scores.prompt_nll < 0.6 * np.log(IDS)
    # "aaaaaaaaa": both expect one more.
    letter = pair.tokenizer.encode("a")[0]
    assert (scores.next_ids["teacher"] == letter).all()
    assert scores.ending["teacher"] < scores.ending["student"] < 0.1
    assert scores.written.tokens.shape == (4, 16)


def test_a_teacher_of_another_vocabulary_reads_noise(tmp_path):
    """Its files look right; only its weights tell."""
    settings, pair = scored_pair(
        tmp_path, copier(8.0), copier(8.0, shuffled=True)
    )
    found = examine.examine_pair(settings, pair)
    ((level, text, way_out),) = named(found, "one batch")
    assert level == "warning"
    assert text.startswith("prompts and completions are noise to the teacher")
    assert "compare the teacher's tokenizer files" in way_out


def test_the_dtypes_of_a_run_bound_its_loss(tmp_path):
    settings, pair = scored_pair(
        tmp_path, make(CONFIG), copier(10.0), teacher__dtype="bfloat16",
        teacher__param_dtype="bfloat16",
    )  # fmt: skip
    with jax.set_mesh(pair.mesh):
        scores = scored.score(settings, pair)
    assert 1e-6 < scores.itself < 0.1
    assert verdicts.itself(scores, pair)[0].level == "ok"


def test_weights_that_are_no_numbers(tmp_path):
    broken = copier(6.0)
    broken.final_norm[...] = broken.final_norm[...].at[:2].set(jnp.nan)
    settings, pair = scored_pair(tmp_path, broken, copier(10.0))
    (found,) = examine.examine_pair(settings, pair)
    assert (found.level, found.text) == (
        "error", "the student's are not all finite: 2 in final_norm"
    )  # fmt: skip
    assert "download it again" in found.way_out


def test_every_teacher_is_looked_at(tmp_path):
    paths = {
        name: hub_directory(tmp_path / name, model=model, ends=[1])
        for name, model in (
            ("student", copier(6.0)), ("good", copier(10.0)),
            ("other", copier(8.0, shuffled=True)),
        )
    }  # fmt: skip
    settings = small_hub.settings(tmp_path, paths["student"], paths["good"])
    rows = (tmp_path / "questions.jsonl").read_text().splitlines()
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps(json.loads(row) | {"who": ["good", "other"][i % 2]})
            + "\n"
            for i, row in enumerate(rows)
        )
    )
    teachers = {
        name: dataclasses.replace(settings.teacher, source=paths[name])
        for name in ("good", "other")
    }
    data = dataclasses.replace(settings.data, teacher_field="who")
    settings = dataclasses.replace(settings, teachers=teachers, data=data)
    found = examine.examine(settings, tmp_path)
    assert ("one batch (good)", "ok") in {(f.name, f.level) for f in found}
    assert {f.name for f in found if f.level != "ok"} <= {
        "one batch (other)", "completions (good)", "completions (other)",
    }  # fmt: skip
    ((level, text, _),) = named(found, "one batch (other)")
    assert level == "warning"
    assert "prompts and completions are noise" in text


class Known:
    """A pair as far as verdicts look at it."""

    class tokenizer:
        eos_ids = (1,)
        special_ids = frozenset({0, 1, 2})

        @staticmethod
        def vocabulary():
            return ["<s>", END, STOP, *"abcdefgh"]

    class student:
        config, head = CONFIG, np.zeros((IDS, 2))

    teacher = student


GOOD = scored.Scores(
    written=dataclasses.replace(make_trajectories()),
    itself=0.0, reverse_kl=1.0, teacher_nll=2.0, prompt_nll=2.0, sampler=0.0,
    padded_mass=0.0, next_ids={"student": np.array([1, 2, 5])}, ending={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "level", "text"),
    [
        ({}, None, None, None),
        ({"itself": 0.02}, "student == teacher", "error", "loss 0.02 nats"),
        ({"itself": np.nan}, "student == teacher", "error", "nan"),
        ({"sampler": 0.02}, "sampler", "warning", "within 0.02 nats"),
        ({"reverse_kl": np.inf}, "one batch", "error", "not finite"),
        ({"reverse_kl": 1e-6}, "one batch", "warning", "already says"),
        ({"teacher_nll": 5.5}, "one batch", "warning", "prompts are not:"),
        ({"teacher_nll": 5.5, "prompt_nll": 5.5}, "one batch", "warning",
         "prompts and completions are noise"),
        ({"padded_mass": 0.72}, "vocabulary", "warning", "72.00% of its"),
        ({"next_ids": {"teacher": np.array([2, 2, 5])}}, "ends in practice",
         "warning", f"the teacher expects 2 {STOP!r}, at which this run does"),
    ],
)  # fmt: skip
def test_what_scores_mean(changes, name, level, text):
    scores = dataclasses.replace(GOOD, **changes)
    rest = [
        f
        for f in (
            *verdicts.itself(scores, Known), *verdicts.sampler(scores, Known),
            *verdicts.batch(scores, Known), *verdicts.padded(scores),
            *verdicts.endings(scores, Known),
        )
        if f.level != "ok"
    ]  # fmt: skip
    assert [(f.name, f.level) for f in rest] == [(name, level)] * bool(name)
    assert all(text in f.text and f.way_out for f in rest)


def test_masks_that_do_not_stop_at_the_end():
    written = make_trajectories()
    assert verdicts.masks(written, (2,))[0].level == "ok"
    late = written.replace(mask=jnp.ones_like(written.mask))
    assert verdicts.masks(late, (2,))[0].level == "error"
    early = written.replace(mask=written.mask & (written.tokens != 2))
    assert verdicts.masks(early, (2,))[0].level == "error"
    assert verdicts.masks(written, (2, 5))[0].level == "error"


def test_the_kernels_that_a_config_asks_for_are_taken_and_compared(
    tmp_path, monkeypatch
):
    settings, pair = scored_pair(
        tmp_path, copier(6.0), copier(10.0), teacher__attention="flash"
    )
    assert pair.student.config.attention == "blocks"
    assert pair.teacher.config.attention == "flash"
    asked = []

    def kernels(models):
        asked.append({n: m.config.attention for n, m in models.items()})
        return [error("attention", "wrong", "take blocks")]

    monkeypatch.setattr(examine, "kernels", kernels)
    *_, found = examine.examine_pair(settings, pair)
    assert asked == [{"student": "blocks", "teacher": "flash"}]
    assert found.text == "wrong"
