"""The host loop: resume, refusal, logs, what is not finite."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

from topd_jax.training import loop as training
from topd_jax.training.checkpointing import Checkpoints, cut_log
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.phases import make_optimizer
from topd_jax.training.setup import load_pair

HERE = Path(__file__).parent


def changed(settings: Settings, section: str, **fields: object) -> Settings:
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The cached models of all runs here."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def settings(world):
    config = small_config()
    config.world.cache = str(world)
    return settings_from(config)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    # The others have no preflight: it must not change a bit.
    training.train(changed(settings, "train", preflight=True), workdir)
    return workdir


def parameters(settings, workdir):
    pair = load_pair(settings, workdir)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    saved = Checkpoints(workdir / "checkpoints", 2)
    state = training.initial_state(pair, optimizer)
    state, key = saved.restore(saved.latest(), state)
    return [np.asarray(x) for x in jax.tree.leaves(state)] + [
        np.asarray(jax.random.key_data(key))
    ]


def without_times(path):
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "rate"))}
        for r in read_jsonl(path)
    ]


def assert_same_run(a, b, settings):
    for x, y in zip(
        parameters(settings, a), parameters(settings, b), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    for name in ("metrics", "evals", "completions", "problems"):
        one = without_times(a / f"{name}.jsonl")
        assert one
        assert one == without_times(b / f"{name}.jsonl")


def test_a_run_logs_every_step(finished, settings):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for name in (
        "loss",
        "divergence",
        "grad_norm",
        "guidance",
        "distance",
        "length_mean",
        "truncated",
        "num_tokens",
        "rate_tokens",
    ):
        assert all(r[name] is not None for r in rows), name
    for name in ("reverse_kl", "forward_kl", "reverse_kl_k1", "student_entropy",
                 "teacher_entropy", "top_k_mass", "top_k_overlap",
                 "seconds_rollout", "seconds_update"):  # fmt: skip
        assert rows[2][name] is not None, name
        assert name not in rows[0]
    # Of a timed step the phases are parts, statistics aside.
    parts = (rows[2][f"seconds_{p}"] for p in ("rollout", "annotate", "update"))
    assert sum(parts) <= rows[2]["seconds"]
    evals = read_jsonl(finished / "evals.jsonl")
    assert [(r["step"], r["final"]) for r in evals] == [
        (0, False), (4, False), (6, True)
    ]  # fmt: skip
    assert len(read_jsonl(finished / "completions.jsonl")) == 8
    told = read_jsonl(finished / "problems.jsonl")
    assert [(r["step"], r["final"]) for r in told[::8]] == [
        (r["step"], r["final"]) for r in evals
    ]
    asked = [r["problem"] for r in told]
    assert len(told) == 24 and asked[:8] == asked[8:16] != asked[16:]


def test_the_student_moves_and_the_teacher_is_not_saved(finished, settings):
    pair = load_pair(settings, finished)
    before = jax.tree.leaves(pair.student)
    after = parameters(settings, finished)[: len(before)]
    pairs = zip(before, after, strict=True)
    assert any((np.asarray(x) != y).any() for x, y in pairs)
    size = sum(
        f.stat().st_size
        for f in (finished / "checkpoints").rglob("*")
        if f.is_file()
    )
    student = sum(x.nbytes for x in before)
    # Student and two moments; a teacher would make it four and more.
    assert size < 2 * 3.5 * student + 200_000


@pytest.mark.parametrize(
    ("kill_at", "where"), [(3, "after_step"), (4, "before_save")]
)
def test_a_killed_run_ends_bit_identical(
    finished, settings, tmp_path, kill_at, where
):
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, HERE / "small_run.py", tmp_path, str(kill_at), where],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    again = small_config()
    again = settings_from(again)
    training.train(again, tmp_path)
    assert_same_run(finished, tmp_path, again)


def test_a_finished_run_is_left_alone(finished, settings):
    before = (finished / "evals.jsonl").read_text()
    training.train(settings, finished)
    assert (finished / "evals.jsonl").read_text() == before


def test_another_config_is_refused(finished, settings):
    other = changed(settings, "optimizer", learning_rate=1.0)
    with pytest.raises(
        ValueError, match=r"optimizer.learning_rate: 0.001 there, 1.0 here"
    ):
        training.train(other, finished)


def test_another_teacher_is_refused(finished, settings, tmp_path):
    pair = load_pair(settings, finished)
    pair = dataclasses.replace(pair, teacher_fingerprint="f" * 64)
    with (
        jax.set_mesh(pair.mesh),
        pytest.raises(ValueError, match="made with another teacher"),
    ):
        training.Run(settings, finished, pair)


def test_too_many_skipped_updates_stop_the_run(settings, tmp_path):
    settings = changed(settings, "train", max_skipped=1)
    pair = load_pair(settings, tmp_path)
    pair.student.final_norm[...] = (
        pair.student.final_norm[...].at[0].set(jnp.nan)
    )
    with jax.set_mesh(pair.mesh):
        run = training.Run(settings, tmp_path, pair)
        with pytest.raises(FloatingPointError, match="train.max_skipped=1"):
            run.train()
    (dump,) = tmp_path.glob("skipped-*.npz")
    assert np.load(dump)["tokens"].shape == (8, 16)


def test_the_step_before_a_timed_one_is_watched_too(settings, tmp_path):
    settings = changed(settings, "train", max_skipped=0)
    pair = load_pair(settings, tmp_path)
    with jax.set_mesh(pair.mesh):
        run = training.Run(settings, tmp_path, pair)
        update = run.phases.update

        def skips_the_second(*args):
            state, metrics = update(*args)
            if run.step == 1:
                metrics["skipped"] = (np.float32(1), np.float32(1))
                state = state.replace(skipped=state.skipped + 1)
            return state, metrics

        run.phases = run.phases._replace(update=skips_the_second)
        with pytest.raises(FloatingPointError, match="train.max_skipped=0"):
            run.train()  # step 3 is timed, and reads step 2 before it begins
    assert run.step == 3


def test_offline_stage_runs(settings, tmp_path):
    settings = changed(settings, "objective", stage="offline")
    final = training.train(changed(settings, "train", steps=2), tmp_path)
    assert final["final"]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert all(r["cross_entropy"] > 0 for r in rows)


def test_cut_log_drops_what_is_past_and_what_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s}) for s in (1, 2, 3)]
    path.write_text("\n".join(rows) + '\n{"step": 2, "lo')
    cut_log(path, 2)
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
