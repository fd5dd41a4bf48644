"""Faults in the numbers of a run: the alarm, the dump, the step again."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import changed, run_in, settings_with

import topd_jax
from topd_jax.cli.replay import replay
from topd_jax.losses.divergences import reverse_kl
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl
from topd_jax.training.setup import with_models

# The token that the objective below cannot bear.
UNBEARABLE = 9


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, objective="opd", train__steps=4, train__max_skipped=1,
        checkpoint__every=1, eval__every=0, eval__problems=4,
        eval__final_problems=4, log__statistics_every=0, guard__window=2,
        guard__rollbacks=0, guard__dumps=9,
    )  # fmt: skip


def train(settings, workdir, setup):
    return run_in(settings, workdir, setup).train()


def alarms(workdir):
    rows = read_jsonl(workdir / "alarms.jsonl")
    return {row["alarm"] for row in rows}


def with_nan(model):
    """The model with one number that is none."""
    arrays = dict(model.arrays)
    arrays["final_norm"] = arrays["final_norm"].at[3].set(jnp.nan)
    return type(model)(model.config, arrays)


def constant(rows, tokens, positions, mask, cache):
    """The same state after every token."""
    return jnp.ones((*tokens.shape, rows.shape[1])), None


def themselves(rows):
    return rows


def of_head(setup, favorite=None, impossible=(), scale=1.0):
    """A model of constant states, with a say in some logits."""
    size = setup.tokenizer.vocab_size
    rows = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    rows *= scale
    rows[list(impossible), 0] = -np.inf
    if favorite is not None:
        rows[favorite, 0] = 100.0
    return topd_jax.from_function(constant, jnp.asarray(rows), head=themselves)


def unbearable(student_logp, teacher_logp, tokens):
    scale = jnp.where(tokens == UNBEARABLE, jnp.nan, 1.0)
    return scale * reverse_kl(student_logp, teacher_logp)


def own():
    return topd_jax.Objective(unbearable)


def test_a_model_that_is_not_finite_is_named(settings, setup, tmp_path):
    """The teacher; a student below, of stage 1."""
    broken = with_nan(setup.teachers[0].model)
    broken = with_models(setup, teacher=broken)
    with pytest.raises(FloatingPointError) as error:
        train(settings, tmp_path, broken)
    dump = tmp_path / "dumps" / "2-given_up"
    assert f"topd replay {dump} shows where it began" in str(error.value)
    assert alarms(tmp_path) == {"non_finite", "teacher_impossible"}
    found = replay(dump, setup=broken)
    assert found["same"] and found["metrics"]["loss"] == [None, None]
    began = found["began"]
    assert began["parameters"] == ["teacher final_norm"]
    assert began["num_tokens"] == found["metrics"]["num_tokens"][0]
    first = began["tokens"][0]
    assert (first["row"], first["place"], first["loss"]) == (0, 0, "nan")
    assert first["teacher_logp"] == "nan"
    assert len(began["gradients"]) == len(setup.student.arrays)


def test_the_token_that_began_it_is_found(settings, setup, tmp_path, topd):
    config = dataclasses.replace(settings, objective="test_replay:own")
    config = changed(config, "train", max_skipped=0)
    with pytest.raises(FloatingPointError):
        train(config, tmp_path, setup)
    before = sorted(p for p in tmp_path.rglob("*"))
    (dump,) = tmp_path.glob("dumps/*-non_finite")
    found = json.loads(topd("replay", dump))
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert found["step"] == int(dump.name.partition("-")[0])
    assert found["same"] and found["metrics"]["skipped"] == [1.0, 1.0]
    began = found["began"]
    tokens = np.load(dump / "batch.npz")["tokens"]
    mask = np.load(dump / "batch.npz")["mask"]
    places = np.argwhere((tokens == UNBEARABLE) & mask)
    assert began["num_tokens"] == len(places) > 0
    assert [began["tokens"][0][k] for k in ("row", "place", "id")] == [
        *places[0], UNBEARABLE
    ]  # fmt: skip
    assert float(began["tokens"][0]["teacher_logp"]) < 0
    assert began["parameters"] == []
    assert len(began["gradients"]) == len(setup.student.arrays)


def test_what_a_teacher_read_is_read_again(settings, tmp_path):
    """The dump has both prompts, and the student may be the teacher."""
    config = changed(
        changed(settings, "train", max_skipped=0), "teacher",
        source="student", prompt="{question}{hint}",
    )  # fmt: skip
    config = changed(config, "data", max_teacher_prompt_length=40)
    config = dataclasses.replace(config, objective="test_replay:own")
    with pytest.raises(FloatingPointError):
        loop.train(config, tmp_path)
    (dump,) = tmp_path.glob("dumps/*-non_finite")
    found = replay(dump)
    assert found["same"]
    assert {"teacher_prompt.tokens", "teacher_prompt.mask"} <= set(
        np.load(dump / "batch.npz")
    )
    assert found["began"]["num_tokens"] > 0
    assert found["began"]["parameters"] == []


def test_a_step_of_stage_1_is_repeated_too(settings, setup, tmp_path):
    config = changed(settings, "train", stage="offline", max_skipped=0)
    broken = with_models(setup, student=with_nan(setup.student))
    with pytest.raises(FloatingPointError):
        train(config, tmp_path, broken)
    found = replay(tmp_path / "dumps" / "1-given_up", setup=broken)
    assert found["same"]
    began = found["began"]
    assert began["parameters"] == ["student final_norm"]
    assert began["num_tokens"] == found["metrics"]["num_tokens"][0]


def test_a_run_that_changes_on_its_way_raises_alarms(settings, setup, tmp_path):
    """From the numbers of real steps; the first alarm of each name."""

    def change(student, **of_teacher):
        run.state = run.state.replace(student=student)
        (teacher,) = run.setup.teachers
        model = of_head(setup, **of_teacher)
        changed = dataclasses.replace(teacher, model=model)
        run.setup = dataclasses.replace(run.setup, teachers=(changed,))

    (end,) = setup.tokenizer.eos_ids
    ends = of_head(setup, favorite=end)
    made_up = with_models(setup, student=ends, teacher=of_head(setup))
    longer = changed(settings, "train", steps=5)
    run = loop.Run(longer, tmp_path, made_up)
    run.repeat(2)
    change(of_head(setup, impossible=[end]), scale=100.0)
    run.repeat(3)
    change(of_head(setup, favorite=UNBEARABLE), impossible=[UNBEARABLE])
    run.repeat(4)
    ((last, compiled),) = run.phases
    rollout = compiled.rollout

    def masked(*arguments):
        rows = rollout(*arguments)
        return rows.replace(mask=jnp.zeros_like(rows.mask))

    run.phases = ((last, compiled._replace(rollout=masked)),)
    run.repeat(5)
    run.logs.close()
    first = {}
    for row in read_jsonl(tmp_path / "alarms.jsonl"):
        first.setdefault(row["alarm"], row["step"])
    assert first == {
        "all_eos": 1, "truncation": 3, "gradient_spike": 3, "repetition": 4,
        "teacher_impossible": 4, "no_tokens": 5,
    }  # fmt: skip


def test_a_directory_that_is_no_dump_is_named(refused, tmp_path):
    message = refused("replay", tmp_path)
    assert message.endswith("is no dump; a run writes them to WORKDIR/dumps")
