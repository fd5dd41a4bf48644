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


def test_the_token_that_began_it_is_found(settings, tmp_path, topd):
    """The teacher reads more, which the dump has; it may be the student."""
    config = changed(settings, "train", max_skipped=0)
    config = changed(
        config, "teacher", source="student", prompt="{question}{hint}"
    )
    config = changed(config, "data", max_teacher_prompt_length=40)
    config = dataclasses.replace(config, objective="test_replay:own")
    with pytest.raises(FloatingPointError):
        loop.train(config, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (dump,) = tmp_path.glob("dumps/*-non_finite")
    found = json.loads(topd("replay", dump))
    assert sorted(tmp_path.rglob("*")) == before
    assert found["step"] == int(dump.name.partition("-")[0])
    assert found["same"] and found["metrics"]["skipped"] == [1.0, 1.0]
    began, batch = found["began"], np.load(dump / "batch.npz")
    places = np.argwhere((batch["tokens"] == UNBEARABLE) & batch["mask"])
    assert began["num_tokens"] == len(places) > 0
    assert [began["tokens"][0][k] for k in ("row", "place", "id")] == [
        *places[0], UNBEARABLE
    ]  # fmt: skip
    assert float(began["tokens"][0]["teacher_logp"]) < 0
    assert began["parameters"] == []
    assert {"teacher_prompt.tokens", "teacher_prompt.mask"} <= set(batch)


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


def test_a_directory_that_is_no_dump_is_named(refused, tmp_path):
    message = refused("replay", tmp_path)
    assert message.endswith("is no dump; a run writes them to WORKDIR/dumps")
