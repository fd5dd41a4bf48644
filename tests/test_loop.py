"""The training loop: logs, resume, refusals, and what is not finite."""

import dataclasses
import functools
import itertools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import compiled_once
import jax.numpy as jnp
import numpy as np
import pytest
from small_broken import breaking
from small_run import (
    assert_same_run,
    changed,
    interrupted,
    run_in,
    saved_arrays,
    without_times,
)

import topd_jax as topd
from topd_jax.objectives.presets import suppress
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def short(settings):
    """As little as a run can be."""
    small = changed(settings, "train", steps=3)
    return changed(small, "eval", every=0, problems=4, final_problems=4)


def test_a_run_logs_every_step(trained):
    rows = read_jsonl(trained / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    always = (
        "loss divergence grad_norm guidance distance length_mean truncated "
        "num_tokens rate_tokens seconds"
    )
    for name in always.split():
        assert all(r[name] is not None for r in rows), name
    timed = (
        "reverse_kl forward_kl reverse_kl_k1 student_entropy teacher_entropy "
        "top_k_mass top_k_overlap seconds_rollout seconds_update"
    )
    for name in timed.split():
        assert rows[2][name] is not None
        assert name not in rows[0]
    # Of a timed step the stages are parts, statistics aside.
    stages = (rows[2][f"seconds_{s}"] for s in ("rollout", "score", "update"))
    assert sum(stages) <= rows[2]["seconds"]
    evals = read_jsonl(trained / "evals.jsonl")
    expected = [(0, False), (4, False), (6, True)]
    assert [(r["step"], r["final"]) for r in evals] == expected
    assert len(read_jsonl(trained / "completions.jsonl")) == 8
    problems = read_jsonl(trained / "problems.jsonl")
    assert [(r["step"], r["final"]) for r in problems[::8]] == expected
    asked = [r["problem"] for r in problems]
    assert len(asked) == 24 and asked[:8] == asked[8:16] != asked[16:]


def test_the_student_moves_and_the_teacher_is_not_saved(trained, setup):
    arrays, step = saved_arrays(trained)
    assert step == 6
    for name, before in setup.student.arrays.items():
        (after,) = (
            x for n, x in arrays.items()
            if "'student'" in n and f"'{name}'" in n
        )  # fmt: skip
        assert (after != np.asarray(before)).any(), name
    # A student and two moments: nothing has the shape of the teacher's.
    size = sum(x.nbytes for x in setup.student.arrays.values())
    assert sum(x.nbytes for x in arrays.values()) < 3 * size + 100


def test_a_run_that_is_killed_twice_ends_bit_identical(
    trained, settings, world_cache, tmp_path
):
    for kill in (("3", "after_step"), ("4", "before_save")):
        done = subprocess.run(
            [sys.executable, HERE / "small_run.py", tmp_path, world_cache,
             *kill],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert read_jsonl(tmp_path / "metrics.jsonl")
    loop.train(settings, tmp_path)
    assert_same_run(trained, tmp_path)


def test_a_clock_that_jumps_changes_nothing(
    trained, settings, tmp_path, monkeypatch
):
    hours, told = itertools.cycle((0, 0.1, -0.1, 240)), time.time
    monkeypatch.setattr(time, "time", lambda: told() + 3600 * next(hours))
    with interrupted(4):
        loop.train(settings, tmp_path)
    loop.train(settings, tmp_path)
    assert_same_run(trained, tmp_path)


def test_rows_in_slots_end_with_the_same_bits(trained, settings, tmp_path):
    """As those of the fixed batch, and stopped on their way."""
    slots = changed(settings, "rollout", slots=4)
    with interrupted(4):
        loop.train(slots, tmp_path)
    loop.train(slots, tmp_path)
    one, two = (saved_arrays(run)[0] for run in (trained, tmp_path))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)
    # An evaluation sums its statistics in parts of four rows.
    for name in ("metrics", "completions"):
        one, two = (
            without_times(run / f"{name}.jsonl") for run in (trained, tmp_path)
        )
        assert one == two and one


def test_a_run_of_another_teacher_is_refused(trained, settings, setup):
    stranger = dataclasses.replace(setup, teacher_fingerprints={"": "f" * 64})
    with pytest.raises(ValueError, match="made with another teacher"):
        loop.Run(settings, trained, stranger)


def test_the_first_step_says_what_it_compiles_and_how_long(
    short, setup, tmp_path, capsys
):
    run = run_in(changed(short, "log", every=2), tmp_path, setup)
    run.train()
    said = capsys.readouterr().err
    lines = [x for x in re.split(r"[\r\n]", said) if re.match("topd: [a-z]", x)]
    assert len(lines) == 2
    assert lines[0].startswith("topd: compiling rollout, score, train_step")
    seconds = re.fullmatch(r"topd: .*step 1 done in (\d+\.\d) s", lines[1])
    assert seconds and float(seconds[1]) >= 0
    # log.every counts: between the steps that are logged nothing is.
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [2]


def test_no_stage_compiles_twice(short, setup, tmp_path):
    timed = changed(short, "log", statistics_every=3)
    with interrupted(3):
        run_in(timed, tmp_path / "resumed", setup).train()
    for folder in ("whole", "resumed"):
        parts = dataclasses.replace(setup)
        compiled_once.check(loop.Run(timed, tmp_path / folder, parts))


def test_guidance_of_the_first_steps(short, setup, tmp_path):
    """The others are steps of OPD: neither looks ahead."""
    first = dataclasses.replace(
        changed(short, "log", every=1),
        objective=short.objective[:-1] + ", guidance_share=0.5)",
    )
    parts = dataclasses.replace(setup)
    # Two programs of score and train_step, and one of all else.
    once = (*compiled_once.PROGRAMS, "score", "train_step")
    compiled_once.check(loop.Run(first, tmp_path / "whole", parts), once)
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert ["guidance" in row for row in rows] == [True, True, False]
    with interrupted(3):
        run_in(first, tmp_path / "resumed", setup).train()
    parts = dataclasses.replace(setup)
    compiled_once.check(loop.Run(first, tmp_path / "resumed", parts))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("skipped", "most", "stops_at"),
    [
        ({4, 5}, 1, 6),  # step 5 is known once step 6 is under way
        ({2, 3}, 1, 3),  # step 3 is timed, and known at once
    ],
)
def test_updates_skipped_in_a_row_stop_the_run(
    settings, setup, tmp_path, skipped, most, stops_at
):
    settings = changed(settings, "train", max_skipped=most)
    settings = changed(settings, "eval", every=0)
    settings = changed(settings, "guard", rollbacks=0)
    run = breaking(run_in(settings, tmp_path, setup), skipped)
    with pytest.raises(FloatingPointError, match=f"max_skipped={most}; to"):
        run.train()
    (dump,) = tmp_path.glob("dumps/*-given_up")
    # Known one step late, or at once where the step is timed.
    assert dump.name == f"{max(skipped)}-given_up"
    assert run.step == stops_at - 1
    assert np.load(dump / "batch.npz")["tokens"].shape == (8, 16)


def test_the_advice_after_skipped_updates_can_be_followed(
    settings, setup, tmp_path, caplog
):
    settings = changed(settings, "eval", every=0)
    strict = changed(settings, "train", max_skipped=0)
    strict = changed(strict, "guard", rollbacks=0)
    run = breaking(run_in(strict, tmp_path, setup), {4})
    with pytest.raises(FloatingPointError, match="lower optimizer.learning_r"):
        run.train()
    run.checkpoints.wait()
    lower = changed(strict, "optimizer", learning_rate=1e-4)
    with caplog.at_level("WARNING", logger="absl"):
        again = run_in(lower, tmp_path, setup)
    assert again.step == 4 or again.step == 2
    assert "optimizer.learning_rate: 0.001 there, 0.0001 here" in caplog.text
    assert again.train()["step"] == 6
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [
        *range(1, 7)
    ]


def test_sigterm_saves_and_says_how_to_resume(
    short, setup, tmp_path, monkeypatch, capfd
):
    told = iter([signal.SIGTERM])
    monkeypatch.setattr(  # evaluations wait for what others were told
        loop.hosts, "told_to_stop", lambda wait: 0 if wait else next(told, 0)
    )
    with pytest.raises(SystemExit) as stopped:
        run_in(short, tmp_path, setup).train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "saved after step 1; rerun the command" in capfd.readouterr().err
    again = run_in(short, tmp_path, setup)
    assert again.step == 1 and again.train()["step"] == 3


# --- an objective, a model of the reader's own ----------------------------


def squared(student_logp, teacher_logp, scale=1.0):
    """A token loss that no preset has."""
    return scale * jnp.mean((student_logp - teacher_logp) ** 2, axis=-1)


def mean_loss_weight(teacher_token_loss, mask):
    return mask * jnp.where(teacher_token_loss > 1.0, 2.0, 1.0)


def own(scale=1.0):
    loss = functools.partial(squared, scale=scale)
    return topd.Objective(loss, token_weights=(mean_loss_weight,))


def test_an_objective_of_ones_own_trains_and_resumes(short, tmp_path):
    config = changed(short, "checkpoint", every=1)
    topd.train(config, tmp_path / "whole", objective=own())
    losses = [
        r["loss"] for r in without_times(tmp_path / "whole" / "metrics.jsonl")
    ]
    assert len(losses) == 3 and min(losses) > 0
    with interrupted(3):
        topd.train(config, tmp_path / "half", objective=own())
    for other in (own(scale=2.0), suppress(), None):
        with pytest.raises(ValueError, match="with other settings .*objective"):
            topd.train(config, tmp_path / "half", objective=other)
    topd.train(config, tmp_path / "half", objective=own())
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    # By name it is the same objective.
    named = dataclasses.replace(config, objective="test_loop:own(scale=1.0)")
    assert topd.train(named, tmp_path / "whole")["step"] == 3


def test_an_objective_that_looks_too_far_is_refused(short, tmp_path):
    far = topd.topd(near_future=topd.NearFuture(window=17))
    with pytest.raises(ValueError, match="window=17 must not exceed .*=16"):
        topd.train(short, tmp_path, objective=far)


def test_any_function_is_a_student(short, setup, tmp_path):
    size = setup.tokenizer.vocab_size
    rows = np.random.default_rng(0).normal(size=(size, 8)).astype(np.float32)

    def bag(rows, tokens, positions, mask, cache):
        x = rows[tokens] / (1.0 + positions[..., None])
        return jnp.tanh(mask.astype(x.dtype) @ x), None

    model = topd.from_function(bag, jnp.asarray(rows), head=lambda r: r)
    final = topd.train(short, tmp_path, student=model)
    assert final["step"] == 3 and np.isfinite(final["reverse_kl"])
    assert topd.train(short, tmp_path, student=model) == final
    (saved,) = (
        x for n, x in saved_arrays(tmp_path)[0].items()
        if "'student'" in n and "params" in n
    )  # fmt: skip
    assert (saved != rows).any()
    same = topd.train(short, tmp_path / "equals", student=model, teacher=model)
    first = read_jsonl(tmp_path / "equals" / "evals.jsonl")[0]
    assert abs(first["reverse_kl"]) < 1e-6 <= abs(same["reverse_kl"])
