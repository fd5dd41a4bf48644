"""The current student is its own teacher, which reads another prompt."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, make_trajectories
from small_files import adapted
from small_run import (
    assert_same_run,
    changed,
    interrupted,
    run_in,
    settings_with,
)
from small_step import assert_trees_close, logp_of, scores, step

from topd_jax.cli.doctor.examine import examine
from topd_jax.experiments import sweep
from topd_jax.models import Lora
from topd_jax.models.config import LORA_TARGETS
from topd_jax.planning.programs import calls
from topd_jax.training import loop
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.logging import read_jsonl
from topd_jax.training.placement import make_run_mesh
from topd_jax.training.setup import read_prompts
from topd_jax.training.shapes import abstract_models
from topd_jax.types import Prompts, Teacher

TOPD = "topd(candidates=3, window=4, branch_fraction=1.0)"
SEVERAL = (
    Teacher(None, "itself", 1),
    Teacher(make_model(1, layers=1), "math", 3),
)


@pytest.fixture
def rows(trajectories):
    """Rows whose teachers read a longer prompt."""
    other = make_trajectories(prompt=9, seed=5)
    own = Prompts(other.prompt, other.prompt_mask)
    return trajectories.replace(teacher_prompt=own)


@pytest.mark.parametrize(
    ("objective", "adapters", "teachers"),
    [("opd", 0, SEVERAL), (TOPD, 2, (Teacher(None),))],
)
def test_it_is_a_frozen_copy_of_the_student_of_this_step(
    rows, objective, adapters, teachers
):
    """Scores by hand, and a step towards the copy."""
    student = make_model(0, layers=1)
    if adapters:
        student = adapted(student, Lora(adapters, 4.0, LORA_TARGETS))
    copy = jax.tree.map(jnp.copy, student)
    frozen = tuple(t.replace(model=t.model or copy) for t in teachers)
    scored = scores(student, teachers, rows, objective)
    expected = scores(student, frozen, rows, objective)
    assert scored[0].teacher_head is None
    assert_trees_close(
        [s.replace(teacher_head=None) for s in scored],
        [s.replace(teacher_head=None) for s in expected],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    own, size = rows.teacher_prompt, scored[0].teacher_token_loss.shape[0]
    logp = logp_of(student, rows.for_teacher)
    by_hand = -np.take_along_axis(logp, rows.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        scored[0].teacher_token_loss, (by_hand * rows.mask)[:size],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    assert own.tokens.shape[1] != rows.prompt.shape[1]
    more = dict(accumulate=len(teachers))
    found, metrics = step(student, teachers, rows, objective, **more)
    wanted, as_copy = step(student, frozen, rows, objective, **more)
    assert metrics["divergence"][0] > 1e-3
    assert_trees_close(metrics, as_copy, rtol=1e-4, atol=1e-5)
    assert_trees_close(found.student, wanted.student, rtol=1e-4, atol=1e-6)


# --- a run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, teacher__source="student",
        teacher__prompt="{question}{hint}", data__max_teacher_prompt_length=40,
        data__samples=2, train__steps=3, log__statistics_every=1,
    )  # fmt: skip


def test_a_run_resumes_and_is_followed_by_its_teacher(
    settings, setup, tmp_path
):
    run_in(settings, tmp_path / "whole", setup).train()
    with interrupted(3):
        run_in(settings, tmp_path / "parts", setup).train()
    run_in(settings, tmp_path / "parts", setup).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    for row in rows:  # one model, two prompts
        assert row["reverse_kl"] > 1e-4
        assert row["divergence"] == pytest.approx(row["reverse_kl"], rel=1e-3)
    for row in read_jsonl(tmp_path / "whole" / "evals.jsonl"):
        assert row["reverse_kl"] > 1e-4
    saved = Checkpoints(tmp_path / "whole" / "checkpoints", 1)
    assert saved.record(3)["teachers"] == {"": "student"}
    saved.close()
    other = changed(settings, "teacher", source="world:student")
    with pytest.raises(ValueError, match="teacher.source: 'student' there"):
        loop.train(other, tmp_path / "whole")


def test_doctor_and_sweep_ask_the_student(settings, tmp_path):
    found, setup = examine(settings, tmp_path)
    assert {f.level for f in found} <= {"ok", "warning"}
    (batch,) = [f for f in found if f.name == "one batch"]
    assert "already says" not in batch.text  # it reads another prompt
    run = sweep._Run("teacher", "", settings)
    row = sweep._measure(run, tmp_path, setup)["evaluation"]
    assert abs(row["reverse_kl"]) < 1e-5


def test_a_plan_has_no_second_model(settings):
    mesh = make_run_mesh(settings, jax.devices()[:1])
    models = abstract_models(settings, mesh)
    assert [t.model for t in models.teachers] == [None]
    with jax.set_mesh(mesh):
        for call in calls(settings, mesh).values():
            call.fn.lower(*call.args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher__source": "student"},
         "teacher.source='student' reads what the student reads"),
        ({"teacher__source": "student", "teacher__quantize": "int8"},
         "source='student', which computes as the student does; give it the "
         "student's {'quantize': ''}"),
        ({"teacher__source": "student", "train__stage": "offline"},
         "teacher.source='student' writes no solutions"),
    ],
)  # fmt: skip
def test_what_teaches_nothing_is_refused(world_cache, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(settings_with(world_cache, **settings))


def test_records_may_bring_what_it_reads(tmp_path):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
    path = tmp_path / "q.jsonl"

    def read():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(settings_with(
            teacher__source="student", data__source="jsonl",
            data__path=str(path), data__held_out=2, eval__problems=1,
            eval__final_problems=1,
        ))  # fmt: skip

    with pytest.raises(ValueError, match="teacher.prompt"):
        read()
    for row in rows:
        row["teacher_prompt"] = row["question"] + " Think."
    train, *_ = read()
    assert train[0]["teacher_prompt"].endswith("Think.")
    for row in rows[:2]:  # held out
        del row["teacher_prompt"]
    with pytest.raises(ValueError, match="there is nothing to learn"):
        read()
