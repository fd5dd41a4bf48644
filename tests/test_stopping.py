"""Signals: one line, what can be saved is, and the same bits after a resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import assert_same_run, settings_with

from topd_jax.parallel import lock, stopping
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl

HERE = Path(__file__).parent


def stopped(arguments, workdir, phase, name, code=None):
    """Runs a training that a signal reaches; what it says of that."""
    done = subprocess.run(
        [sys.executable, HERE / "small_stop.py", phase, name, "train",
         *arguments, f"--workdir={workdir}"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    code = code or 128 + signal.Signals[name]
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and done.stdout == ""
    # Nothing follows the line that says how it ended.
    assert "step/s" not in done.stderr.splitlines()[-1]
    said = ("topd: stop", "topd: SIG", "topd: [", "workers ")
    return [x for x in done.stderr.splitlines() if x.startswith(said)]


@pytest.mark.parametrize(
    ("phase", "name", "step"),
    [
        ("step", "SIGINT", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("save", "SIGINT", 3),
                ("evaluate", "SIGTERM", 4),
                ("last", "SIGTERM", 6),
            ]
        ),
    ],
)
def test_a_stopped_run_is_saved_and_ends_bit_identical(
    trained, small_arguments, world_cache, tmp_path, phase, name, step
):
    *before, last = stopped(small_arguments, tmp_path, phase, name)
    assert last == (
        f"topd: stopped by {name} and saved after step {step}; rerun the "
        "command to resume"
    )
    waits = f"topd: {name}: stopping after this step; again: at once"
    assert (waits in before) == (phase != "evaluate")
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == step
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    loop.train(settings_with(world_cache), tmp_path)
    assert_same_run(trained, tmp_path)
    best = [
        sorted(p.name for p in (run / "best").iterdir())
        for run in (trained, tmp_path)
    ]
    assert best[0] == best[1]


@pytest.mark.slow
def test_a_save_that_fails_is_one_line(small_arguments, tmp_path):
    said = stopped(small_arguments, tmp_path, "full", "SIGTERM", code=2)
    assert said == [
        "topd: [Errno 28] No space left on device: '/full'; make room and "
        "rerun the command to resume"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("compile", "SIGINT"), ("twice", "SIGTERM"), ("grade", "SIGINT"),
        ("world", "SIGTERM"),
    ],
)  # fmt: skip
def test_elsewhere_a_signal_stops_at_once(
    small_arguments, tmp_path, phase, name
):
    cache = [f"--config.world.cache={tmp_path / 'world'}"] * (phase == "world")
    said = stopped([*small_arguments, *cache], tmp_path, phase, name)
    assert said[-1] == f"topd: stopped by {name}; rerun the command to resume"
    if phase == "grade":
        pids = said[0].split()[1:]
        assert pids
        while any(lock._started(int(pid)) for pid in pids):
            time.sleep(0.1)


WATCHED = """
import os, signal, sys, time
from topd_jax.parallel import stopping
signal.signal(signal.SIGINT, signal.SIG_IGN)
stopping.watch(str)
os.kill(os.getpid(), signal.SIGINT)
print("still here", flush=True)
time.sleep(60)
"""


def test_a_signal_that_was_ignored_stays_ignored():
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "still here\n"
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert err == "topd: stopped by SIGTERM\n"


def test_as_a_function_nothing_is_watched(monkeypatch):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stopping.after_the_step(), stopping.answered_by(os.abort):
        assert stopping.asked() == 0
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert before == after


def test_a_signal_that_waits_is_answered_by_what_comes_next(monkeypatch, capfd):
    monkeypatch.setattr(stopping, "_asked", 0)
    monkeypatch.setattr(stopping, "_resumes", False)

    def stop():
        with stopping.after_the_step():
            stopping._respond(signal.SIGINT)
            assert stopping.asked() == signal.SIGINT
            with stopping.answered_by(answers.append):
                assert answers == [signal.SIGINT]

    answers = []
    with pytest.raises(SystemExit) as left:
        stop()
    assert left.value.code == 130
    assert capfd.readouterr().err.splitlines() == [
        "topd: SIGINT: stopping after this step; again: at once",
        "topd: stopped by SIGINT",
    ]
    assert stopping._answer is None
