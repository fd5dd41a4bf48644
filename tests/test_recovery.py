"""Runs that are made longer, go wrong, roll back or are given up."""

import shutil

import pytest
from small_broken import breaking
from small_run import (
    assert_same_run,
    changed,
    interrupted,
    run_in,
    saved_arrays,
    settings_with,
)
from small_step import assert_trees_equal

from topd_jax.cli.replay import replay
from topd_jax.training import logging, loop
from topd_jax.training.logging import read_jsonl


@pytest.fixture(scope="module")
def settings(world_cache):
    """As little as a run can be, without a look ahead."""
    return settings_with(
        world_cache, objective="opd", train__steps=4, checkpoint__every=2,
        eval__every=0, eval__problems=4, eval__final_problems=4,
        log__statistics_every=0, log__completions_every=0,
    )  # fmt: skip


# --- longer ---------------------------------------------------------------


def test_a_finished_run_can_be_made_longer(settings, setup, tmp_path, caplog):
    """And one that is stopped on that way ends with the same bits."""
    run_in(settings, tmp_path / "whole", setup).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    longer = changed(settings, "train", steps=7)
    with caplog.at_level("WARNING", logger="absl"):
        run = run_in(longer, tmp_path / "whole", setup)
    assert "another setting: train.steps: 4 there, 7 here" in caplog.text
    (line,) = (r.message for r in caplog.records if "cosine" in r.message)
    # Warm-up takes one update; then 3 / 6 of the cosine in place of its end.
    assert line == (
        "the cosine ends at step 7, not 4, and a share of the steps, such as "
        "guidance's, with it; the learning rate of update 5 is "
        "0.0005, not 1e-08"
    )
    assert run.train()["step"] == 7
    evals = read_jsonl(tmp_path / "whole" / "evals.jsonl")
    assert [(r["step"], r["final"]) for r in evals] == [
        (0, False), (4, True), (7, True)
    ]  # fmt: skip
    metrics = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [*range(1, 8)]
    with interrupted(7):
        run_in(longer, tmp_path / "half", setup).train()
    caplog.clear()
    assert run_in(longer, tmp_path / "half", setup).train() == evals[-1]
    assert "learning rate" not in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    # It is finished again, and cannot be made shorter than it is.
    run = run_in(longer, tmp_path / "whole", setup)
    assert run.train() == evals[-1] and run.best.latest() is None
    with pytest.raises(ValueError, match=r"steps=4 must be at least 7, the st"):
        run_in(settings, tmp_path / "whole", setup)
    lower = changed(longer, "optimizer", learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"use what differs \(optimizer.lea"):
        run_in(lower, tmp_path / "whole", setup)


def test_the_best_student_is_saved_and_dropped_with_its_steps(
    settings, setup, tmp_path, monkeypatch
):
    """Another rate makes others, and the new ones would not replace it."""
    settings = changed(settings, "eval", every=3)
    monkeypatch.setattr(loop, "better", lambda *_: True)
    write, seen = logging.Logs.write, []

    def told(logs, name, row):
        if name == "evals":
            seen.append((row["step"], run.best.latest()))
        write(logs, name, row)

    run = run_in(settings, tmp_path, setup)
    with monkeypatch.context() as patch, interrupted(4):
        patch.setattr(logging.Logs, "write", told)
        run.train()
    # Before it is told: that is not evaluated again, so never saved.
    assert seen == [(0, 0), (3, 3)]
    assert saved_arrays(tmp_path, "best")[1] == 3
    lower = changed(settings, "optimizer", learning_rate=1e-4)
    shutil.copytree(tmp_path / "best", tmp_path / "unsaved" / "best")
    run = run_in(lower, tmp_path, setup)
    assert (run.step, run.best.latest()) == (2, None)
    # Where nothing else is saved, it stays until there is another.
    alone = tmp_path / "unsaved"
    run = run_in(lower, alone, setup)
    assert (run.step, run.best.latest()) == (0, 3)
    before, _ = saved_arrays(alone, "best")
    run.train()
    after, step = saved_arrays(alone, "best")
    assert step == 3 and any((after[k] != before[k]).any() for k in after)


# --- rolled back ----------------------------------------------------------


@pytest.fixture(scope="module")
def strict(settings):
    """Two skipped updates are too many; evaluations on the way."""
    settings = changed(settings, "train", max_skipped=1, steps=8)
    return changed(settings, "eval", every=3)


@pytest.fixture(scope="module")
def rolled_back(strict, setup, tmp_path_factory):
    """A run whose steps 5 and 6 fail once, and one that nothing disturbs."""
    folder = tmp_path_factory.mktemp("rolled-back")
    breaking(run_in(strict, folder / "one", setup), {5, 6}).train()
    run_in(strict, folder / "plain", setup).train()
    return folder


def test_skipped_updates_roll_a_run_back(rolled_back, capsys):
    one, plain = (
        read_jsonl(rolled_back / name / "metrics.jsonl")
        for name in ("one", "plain")
    )
    assert [r["step"] for r in one] == [*range(1, 9)]
    losses, same = ([r["loss"] for r in rows] for rows in (one, plain))
    # From the checkpoint of step 4 on everything is other than before.
    assert losses[:4] == same[:4]
    assert not set(losses[4:]) & set(same[4:])
    assert not any(r["skipped"] for r in one)
    # The data are others anyway, so losses alone do not show the key.
    keys = [
        next(a for n, a in saved_arrays(rolled_back / name)[0].items()
             if "key" in n).tolist()
        for name in ("one", "plain")
    ]  # fmt: skip
    assert keys[0] != keys[1]
    evals = read_jsonl(rolled_back / "one" / "evals.jsonl")
    assert [r["step"] for r in evals] == [0, 3, 6, 8]
    (alarm,) = read_jsonl(rolled_back / "one" / "alarms.jsonl")
    assert alarm == {
        "step": 5, "alarm": "rollback", "text": "to step 4, from the 2 "
        "skipped updates up to step 6",
    }  # fmt: skip
    assert (rolled_back / "one" / "dumps" / "5-non_finite").is_dir()
    assert not (rolled_back / "plain" / "dumps").exists()


def test_a_run_that_is_stopped_about_a_roll_back_ends_with_the_same_bits(
    rolled_back, strict, setup, tmp_path, monkeypatch
):
    """Before a checkpoint knows of it, which is made again, and after."""
    plain = loop.Run._one_step

    def stopping(self, step):
        if step == at and self.rollbacks:
            raise KeyboardInterrupt
        return plain(self, step)

    run = run_in(strict, tmp_path, setup)
    for at in (6, 8):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_one_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                breaking(run, {5, 6}).train()
        run.checkpoints.wait()
        run = run_in(strict, tmp_path, setup)
        assert run.rollbacks == (at == 8)
    breaking(run, {5, 6}).train()
    assert_same_run(rolled_back / "one", tmp_path)
    assert read_jsonl(tmp_path / "alarms.jsonl") == read_jsonl(
        rolled_back / "one" / "alarms.jsonl"
    )
    (best, step), (other, at) = (
        saved_arrays(workdir, "best")
        for workdir in (rolled_back / "one", tmp_path)
    )
    assert step == at
    assert_trees_equal(best, other)


def test_a_run_that_roll_backs_do_not_help_is_given_up(
    strict, setup, tmp_path, capsys
):
    run = breaking(run_in(strict, tmp_path, setup), {5, 6}, tries=2)
    with pytest.raises(FloatingPointError) as error:
        run.train()
    assert str(error.value) == (
        "2 updates in a row had a non-finite loss or gradient, more than "
        "train.max_skipped=1, also after 1 roll-back(s); topd replay "
        f"{tmp_path}/dumps/6-given_up shows where it began; resume with a "
        "lower optimizer.learning_rate or optimizer.clip; remove "
        f"{tmp_path}/checkpoints/4 to resume from step 2"
    )
    assert run.step == 6  # known once step 7 is under way
    said = capsys.readouterr().err
    assert said.count("topd: rolled back to step 4, from the 2 skipped") == 1
    assert said.count("topd: alarm non_finite at step 5: loss or gradient") == 2
    run.checkpoints.wait()
    # The dump leads through the roll-back; what was pretended alone differs.
    found = replay(tmp_path / "dumps" / "6-given_up", setup=setup)["metrics"]
    assert [n for n, (a, b) in found.items() if a != b] == ["skipped"]
    # The advice can be followed.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    lower = changed(strict, "optimizer", learning_rate=1e-4)
    run = run_in(lower, tmp_path, setup)
    assert run.step == 2 and run.train()["step"] == 8


def test_without_a_checkpoint_a_run_is_given_up(strict, setup, tmp_path):
    """It would be the same settings from the same start again."""
    run = breaking(run_in(strict, tmp_path, setup), {1, 2})
    with pytest.raises(FloatingPointError) as error:
        run.train()
    assert str(error.value).endswith(
        "; nothing is saved yet to roll back to (checkpoint.every=2); start "
        "again with a lower optimizer.learning_rate or optimizer.clip"
    )
    run.best.wait()  # a process that ends writes nothing more
    lower = changed(strict, "optimizer", learning_rate=1e-4)
    run = run_in(lower, tmp_path, setup)
    assert run.step == 0 and run.train()["step"] == 8
