"""Runs that are made longer, go wrong, roll back or are given up."""

import dataclasses

import pytest
from small_run import assert_same_run, changed, interrupted, settings_with

from topd_jax.training import loop, recovery
from topd_jax.training.logging import read_jsonl
from topd_jax.training.setup import load_setup


@pytest.fixture(scope="module")
def settings(world_cache):
    """As little as a run can be, without a look ahead."""
    return settings_with(
        world_cache, objective="opd", train__steps=4, checkpoint__every=2,
        eval__every=0, eval__problems=4, eval__final_problems=4,
        log__statistics_every=0, log__completions_every=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def setup(settings, tmp_path_factory):
    return load_setup(settings, tmp_path_factory.mktemp("setup"))


def run_in(settings, workdir, setup):
    """A run that leaves the module's setup as it was."""
    return loop.Run(settings, workdir, dataclasses.replace(setup))


# --- longer ---------------------------------------------------------------


def test_a_finished_run_can_be_made_longer(settings, setup, tmp_path, caplog):
    run_in(settings, tmp_path, setup).train()
    longer = changed(settings, "train", steps=7)
    with caplog.at_level("WARNING", logger="absl"):
        run = run_in(longer, tmp_path, setup)
    assert "another setting: train.steps: 4 there, 7 here" in caplog.text
    (line,) = (r.message for r in caplog.records if "cosine" in r.message)
    # Warm-up takes one update; then 3 / 6 of the cosine in place of its end.
    assert line == (
        "the cosine ends at step 7, not 4; the learning rate of update 5 is "
        "0.0005, not 1e-08"
    )
    assert run.train()["step"] == 7
    evals = read_jsonl(tmp_path / "evals.jsonl")
    assert [(r["step"], r["final"]) for r in evals] == [
        (0, False), (4, True), (7, True)
    ]  # fmt: skip
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [*range(1, 8)]
    # It is finished again, and cannot be made shorter than it is.
    assert run_in(longer, tmp_path, setup).train() == evals[-1]
    with pytest.raises(ValueError, match=r"steps=4 must be at least 7, the st"):
        run_in(settings, tmp_path, setup)


def test_a_longer_run_that_is_stopped_ends_with_the_same_bits(
    settings, setup, tmp_path
):
    longer = changed(settings, "train", steps=6)
    for folder in ("whole", "half"):
        run_in(settings, tmp_path / folder, setup).train()
    run_in(longer, tmp_path / "whole", setup).train()
    with interrupted(6):
        run_in(longer, tmp_path / "half", setup).train()
    run_in(longer, tmp_path / "half", setup).train()
    assert_same_run(tmp_path / "whole", tmp_path / "half")


def test_a_floor_may_change(settings, setup, tmp_path, caplog):
    run_in(changed(settings, "train", steps=2), tmp_path, setup).train()
    deeper = dataclasses.replace(
        changed(settings, "train", steps=3), objective="opd(log_floor=-50.0)"
    )
    with caplog.at_level("WARNING", logger="absl"):
        assert run_in(deeper, tmp_path, setup).train()["step"] == 3
    assert "objective.token_loss.log_floor: None there, -50.0 " in caplog.text
    other = dataclasses.replace(deeper, objective="opd(token_loss='jsd')")
    with pytest.raises(ValueError, match=r"token_loss: .*reverse_kl"):
        run_in(other, tmp_path, setup)
    assert recovery.tell_schedule(
        {"settings": deeper.to_dict()}, deeper,
        run_in(deeper, tmp_path, setup).state,
    ) == ""  # fmt: skip
