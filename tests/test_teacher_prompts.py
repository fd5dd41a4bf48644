"""A teacher reads a prompt of its own before the student's completion."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from small_run import changed, settings_with
from small_step import TOPD, assert_trees_close, logp_of, scores, update

from topd_jax.cli.doctor.examine import examine_files
from topd_jax.data import prompts
from topd_jax.data.sources import Fields, read_source, read_world
from topd_jax.data.templates import teacher_prompt
from topd_jax.data.toy_world import problems
from topd_jax.experiments import detectors
from topd_jax.planning import programs
from topd_jax.training.dumps import arrays_of
from topd_jax.training.placement import make_run_mesh
from topd_jax.training.setup import load_setup
from topd_jax.types import Prompts


@pytest.fixture
def rows(trajectories):
    """Rows whose teachers read a longer prompt."""
    other = make_trajectories(prompt=9, seed=5)
    own = Prompts(other.prompt, other.prompt_mask)
    return trajectories.replace(teacher_prompt=own)


def test_a_teacher_scores_and_branches_after_its_own_prompt(
    student, teacher, rows
):
    """As if the student had been asked the same; it reads its own prompt."""
    own = rows.teacher_prompt
    asked = rows.replace(
        prompt=own.tokens, prompt_mask=own.mask, teacher_prompt=None
    )
    scored = scores(student, teacher, rows, TOPD)
    assert_trees_close(
        scored, scores(student, teacher, asked, TOPD), rtol=1e-5, atol=1e-6
    )
    assert scored[0].divergent.any()
    plain = rows.replace(teacher_prompt=None)
    state, metrics = update(student, rows, scored, TOPD, 1)
    same, again = update(student, plain, scored, TOPD, 1)
    assert_trees_close(metrics, again, rtol=1e-5)
    assert_trees_close(state.student, same.student, rtol=1e-5)


def test_certainty_is_of_what_the_teacher_says_after_its_prompt(
    student, teacher, rows
):
    right = logp_of(teacher, rows.for_teacher).argmax(-1)[..., None]
    want = jnp.take_along_axis(logp_of(student, rows), right, -1)[..., 0]
    found = detectors._right(student, teacher, rows)
    mask = rows.mask
    np.testing.assert_allclose(found[mask], want[mask], rtol=1e-4)


# --- the data ---------------------------------------------------------------


def read(tmp_path, *rows, field="", **templates):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = Fields(
        teacher=field, teachers=tuple(templates),
        templates=templates or {"": "{question} Hint: {hint} {{1}}"},
    )  # fmt: skip
    records = read_source("jsonl", str(path), fields=fields)
    return [record.get("teacher_prompt") for record in records]


def test_templates_and_the_records_own_prompt(tmp_path):
    rows = (
        {"question": "1+1?", "hint": 2},
        {"question": "1+2?", "hint": "3", "teacher_prompt": " "},
        {"question": "1+3?", "teacher_prompt": "It is 4."},
    )
    assert read(tmp_path, *rows) == [
        "1+1? Hint: 2 {1}", "1+2? Hint: 3 {1}", "It is 4."
    ]  # fmt: skip
    rows = ({"question": "a", "by": "code"}, {"question": "b", "by": "math"})
    own = read(tmp_path, *rows, field="by", code="", math="{question}!")
    assert own == [None, "b!"]


def test_not_a_number_is_no_text():
    """Tables have columns of any width."""
    row = {"question": "1?", "hint": np.float32("nan")}
    with pytest.raises(ValueError, match="has no text in the field"):
        teacher_prompt(row, "", "{question}{hint}", "line 1")
    row["teacher_prompt"] = np.float32("nan")
    assert teacher_prompt(row, "", "", "line 1") is None


@pytest.mark.parametrize(
    "row", [{}, {"hint": ""}, {"hint": ["a"]}, {"teacher_prompt": ["a"]}]
)
def test_a_field_without_text_is_named(tmp_path, row):
    bad = {"question": "1?"} | row
    whole = {"question": "1?", "hint": "2"}
    name = "teacher_prompt" if "teacher_prompt" in row else "hint"
    with pytest.raises(ValueError, match=rf'line 2 has no text .* "{name}"'):
        read(tmp_path, whole, bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher__prompt": "Solve it."}, "'Solve it.' must name fields of"),
        ({"teacher__prompt": "{} or {a!r}"}, "must name fields of a record"),
        ({"teacher__prompt": "{question"}, "is no template (expected '}'"),
        ({"student__prompt": "{question}"}, "student.prompt='{question}' must"),
        ({"teacher__prompt": "{question} {so}"}, 'no text in the field "so" '
         "(teacher.prompt); its fields are ['answer', 'hint', 'question', "
         "'solution']; name one of them"),
        ({"teacher__prompt": "{question}{question}"}, "tokens; the limit is "
         "16: raise data.max_teacher_prompt_length"),
        ({"teacher__prompt": "{hint}", "train__stage": "offline"},
         "with train.stage=offline the teacher reads the student's prompts"),
    ],
)  # fmt: skip
def test_what_no_teacher_can_read_is_refused(
    world_cache, tmp_path, settings, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_setup(settings_with(world_cache, **settings), tmp_path)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (["train", "--config.train.stage=offline"], "train.stage=offline"),
        (["generate"], "topd generate"),
        (["correct", "--which=start"], "topd correct"),
    ],
)
def test_commands_with_one_prompt_for_both_say_so(command, refused, line, name):
    own = "--config.teacher.prompt={question}{hint}"
    room = "--config.data.max_teacher_prompt_length=40"
    bars = line[0] != "train"  # which is refused before models are made
    said = refused(*command(line[0], own, room, *line[1:]), bars=bars)
    assert f"with {name} the teacher reads the student's prompts: " in said
    assert "leave teacher.prompt out" in said


def test_batches_have_both_prompts(tokenizer):
    template = "{question}{hint}"
    records = read_world("train", 20, 0, template)
    for record in records:
        more = problems.privileged(record["prompt"])
        assert record["teacher_prompt"] == record["prompt"] + more["hint"]
        assert more["solution"].startswith(more["hint"])
        assert problems.is_correct(record["prompt"], more["solution"])
    longest = max(len(tokenizer.chat(r["teacher_prompt"])) for r in records)
    del records[1]["teacher_prompt"]  # this one is read by both
    told = dict(max_length=20, on_long_prompt="skip")
    whole = prompts.encode_prompts(
        records, tokenizer, teacher_width=longest, **told
    )
    less = prompts.encode_prompts(
        records, tokenizer, teacher_width=longest - 1, **told
    )
    assert whole.skipped == 0 < less.skipped
    # Problems are taken several times where each has several samples.
    asked = whole.take([3, 1, 3])
    (batch,) = prompts.ordered_batches(asked, batch_size=3)
    own = batch.prompts.teacher
    assert own.tokens.shape == (3, longest)
    hint, plain = records[3]["teacher_prompt"], records[1]["prompt"]
    for tokens, mask, text in zip(
        own.tokens, own.mask, (hint, plain, hint), strict=True
    ):
        assert tokens[mask].tolist() == tokenizer.chat(text)


# --- a run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, teacher__prompt="{question}{hint}",
        data__max_teacher_prompt_length=40,
    )  # fmt: skip


def test_the_doctor_shows_what_the_teacher_reads(settings, tmp_path):
    found = [
        f for f in examine_files(settings, tmp_path)
        if f.name == "teacher reads"
    ]  # fmt: skip
    (record,) = read_world("train", 1, 0, "{question}{hint}")
    assert [f.level for f in found] == ["ok"]
    assert f"{record['teacher_prompt']!r} for tiny world" in found[0].text
    assert "of at most 40 tokens" in found[0].text


def test_plans_and_dumps_hold_both_prompts(settings, rows):
    mesh = make_run_mesh(settings, jax.devices()[:1])
    planned = programs._prompts(settings, mesh, 8)
    assert planned.teacher.tokens.shape == (8, 40)
    own = changed(settings, "teacher", prompt="")  # of the records alone
    planned = programs._prompts(own, mesh, 8)
    assert planned.teacher.tokens.shape == (8, 40)
    arrays = arrays_of(rows)
    assert arrays["teacher_prompt.tokens"].shape == (8, 9)
    assert arrays["prompt"].shape == (8, 5)
