"""The training loop: logs, resume, refusals, and what is not finite."""

import dataclasses
import functools
import itertools
import re
import shutil
import time

import compiled_once
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_model import make_foreign
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
from topd_jax.parallel import compilation
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl


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


def test_a_run_that_is_killed_ends_bit_identical(
    trained, settings, setup, tmp_path, monkeypatch
):
    """Before a save; and the clock of the machine may jump, there and back."""
    killed = tmp_path / "killed"

    def copy(run):
        if run.step == 4:
            run.checkpoints.wait()
            # What is on the disk now is what a kill would leave.
            shutil.copytree(run.workdir, killed)
            raise KeyboardInterrupt
        save(run)

    with monkeypatch.context() as patch:
        save = loop.Run.save
        patch.setattr(loop.Run, "save", copy)
        with pytest.raises(KeyboardInterrupt):
            run_in(settings, tmp_path / "run", setup).train()
    assert len(read_jsonl(killed / "metrics.jsonl")) == 4
    hours, told = itertools.cycle((0, 0.1, -0.1, 240)), time.time
    monkeypatch.setattr(time, "time", lambda: told() + 3600 * next(hours))
    stranger = dataclasses.replace(setup, teacher_fingerprints={"": "f" * 64})
    with pytest.raises(ValueError, match="made with another teacher"):
        loop.Run(settings, killed, stranger)
    run_in(settings, killed, setup).train()
    assert_same_run(trained, killed)


def test_rows_in_slots_end_with_the_same_bits(
    trained, settings, setup, tmp_path
):
    """As those of the fixed batch, and stopped on their way."""
    slots = changed(settings, "rollout", slots=4)
    with interrupted(4):
        run_in(slots, tmp_path, setup).train()
    run_in(slots, tmp_path, setup).train()
    one, two = (saved_arrays(run)[0] for run in (trained, tmp_path))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)
    # An evaluation sums its statistics in parts of four rows.
    for name in ("metrics", "completions"):
        one, two = (
            without_times(run / f"{name}.jsonl") for run in (trained, tmp_path)
        )
        assert one == two and one


def test_each_stage_compiles_once_and_the_first_step_says_so(
    short, setup, tmp_path, capsys
):
    """Guidance of the first steps: the others, of OPD, do not look ahead."""
    objective = short.objective[:-1] + ", guidance_share=0.5)"
    first = dataclasses.replace(short, objective=objective)
    compilation._jitted.cache_clear()
    parts = dataclasses.replace(setup)
    # Two programs of score and train_step, and one of all else.
    once = (*compiled_once.PROGRAMS, "score", "train_step")
    compiled_once.check(loop.Run(first, tmp_path / "whole", parts), once)
    said = capsys.readouterr().err
    lines = [x for x in re.split(r"[\r\n]", said) if re.match("topd: [a-z]", x)]
    assert len(lines) == 2
    assert lines[0].startswith("topd: compiling rollout, score, train_step")
    assert re.fullmatch(r"topd: .*step 1 done in \d+\.\d s", lines[1])
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert ["guidance" in row for row in rows] == [True, True, False]
    with interrupted(3):
        run_in(first, tmp_path / "resumed", setup).train()
    parts = dataclasses.replace(setup)
    compiled_once.check(loop.Run(first, tmp_path / "resumed", parts), ())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_only_what_the_package_computes_is_shared(short, setup, tmp_path):
    """Another's functions may read what has changed since the first run."""
    counts = itertools.count()

    def score(own=None, **changes):
        settings = dataclasses.replace(short, **changes)
        workdir = tmp_path / str(next(counts))
        parts = dataclasses.replace(setup)
        return loop.Run(settings, workdir, parts, own).phases[0][1].score

    assert score(seed=1) is score(seed=2)
    own, loss = topd.opd(), "topd_jax.losses.divergences:reverse_kl"
    assert score(own) is not score(own)
    named = {"objective": f"opd(token_loss={loss!r})"}
    assert score(**named) is not score(**named)
    foreign = dataclasses.replace(setup, student=make_foreign(0))
    assert setup.is_ours and not foreign.is_ours
    assert setup.evaluator(short).shared
    assert not foreign.evaluator(short).shared


# --- an objective, a model of the reader's own ----------------------------


def squared(student_logp, teacher_logp, scale=1.0):
    """A token loss that no preset has."""
    return scale * jnp.mean((student_logp - teacher_logp) ** 2, axis=-1)


def mean_loss_weight(teacher_token_loss, mask):
    return mask * jnp.where(teacher_token_loss > 1.0, 2.0, 1.0)


def own(scale=1.0):
    loss = functools.partial(squared, scale=scale)
    return topd.Objective(loss, token_weights=(mean_loss_weight,))


def test_an_objective_of_ones_own_trains_and_resumes(short, setup, tmp_path):
    config = changed(short, "checkpoint", every=1)

    def train(config, objective):
        parts = dataclasses.replace(setup)
        return topd.train(config, tmp_path, objective=objective, setup=parts)

    far = topd.topd(near_future=topd.NearFuture(window=17))
    with pytest.raises(ValueError, match="window=17 must not exceed .*=16"):
        train(config, far)
    with interrupted(3):
        train(config, own())
    for other in (own(scale=2.0), suppress(), None):
        with pytest.raises(ValueError, match="with other settings .*objective"):
            train(config, other)
    assert train(config, own())["step"] == 3
    losses = [r["loss"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(losses) == 3 and min(losses) > 0
    # By name it is the same objective.
    named = dataclasses.replace(config, objective="test_loop:own(scale=1.0)")
    assert train(named, None)["step"] == 3


def test_any_function_is_a_student(short, setup, tmp_path):
    size = setup.tokenizer.vocab_size
    rows = np.random.default_rng(0).normal(size=(size, 8)).astype(np.float32)

    def bag(rows, tokens, positions, mask, cache):
        x = rows[tokens] / (1.0 + positions[..., None])
        return jnp.tanh(mask.astype(x.dtype) @ x), None

    def train(**models):
        parts = dataclasses.replace(setup)
        return topd.train(short, tmp_path, setup=parts, **models)

    model, teacher = (
        topd.from_function(bag, jnp.asarray(x), head=lambda r: r)
        for x in (rows, -rows)
    )
    final = train(student=model, teacher=teacher)
    assert final["step"] == 3 and 0 < final["reverse_kl"] < np.inf
    assert train(student=model, teacher=teacher) == final
    (saved,) = (
        x for n, x in saved_arrays(tmp_path)[0].items()
        if "'student'" in n and "params" in n
    )  # fmt: skip
    assert (saved != rows).any()
