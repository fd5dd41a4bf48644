"""Signals: one line, what can be saved is, and the same bits after a resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import assert_same_run

from topd_jax.cli import main
from topd_jax.parallel import lock, stopping
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl

HERE = Path(__file__).parent


def stopped(arguments, workdir, phase, name):
    """Runs a training that a signal reaches; what it says of that."""
    done = subprocess.run(
        [sys.executable, HERE / "small_stop.py", phase, name, "train",
         *arguments, f"--workdir={workdir}"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    code = 128 + signal.Signals[name]
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and done.stdout == ""
    # Nothing follows the line that says how it ended.
    assert "step/s" not in done.stderr.splitlines()[-1]
    said = ("topd: stop", "topd: SIG", "workers ")
    return [x for x in done.stderr.splitlines() if x.startswith(said)]


def assert_resumes(trained, workdir, settings, step):
    """What was stopped was saved, and ends with the same bits."""
    assert read_jsonl(workdir / "metrics.jsonl")[-1]["step"] == step
    assert (workdir / "checkpoints" / str(step)).is_dir()
    loop.train(settings, workdir)
    assert_same_run(trained, workdir)
    best = [
        sorted(p.name for p in (run / "best").iterdir())
        for run in (trained, workdir)
    ]
    assert best[0] == best[1]


@pytest.fixture
def watched(monkeypatch):
    """Signals are heard as in a process of the command line."""
    for name, value in (("_asked", 0), ("_resumes", False), ("_explain", str)):
        monkeypatch.setattr(stopping, name, value)
    numbers = signal.SIGINT, signal.SIGTERM
    # Whatever the shell that runs the tests ignores.
    kept = [signal.signal(n, signal.default_int_handler) for n in numbers]
    # What would end this process at once is no end of all tests.
    monkeypatch.setattr(os, "_exit", lambda code: None)
    stopping.watch(str)
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, kept, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "step"), [("SIGINT", 3), ("SIGTERM", 6)])
def test_a_stopped_run_is_saved_and_ends_bit_identical(
    watched, trained, settings, command, tmp_path, monkeypatch, capfd, name,
    step,
):  # fmt: skip
    """Also after the last step: its evaluation is made up for."""
    one_step = loop.Run._one_step

    def signaled(run, at):
        if at == step:
            os.kill(os.getpid(), signal.Signals[name])
            until = time.monotonic() + 10
            while not stopping.asked() and time.monotonic() < until:
                time.sleep(0.01)
        return one_step(run, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_one_step", signaled)
        with pytest.raises(SystemExit) as left:
            main.run(command("train"))
    assert left.value.code == 128 + signal.Signals[name]
    lines = capfd.readouterr().err.splitlines()
    assert f"topd: {name}: stopping after this step; again: at once" in lines
    # Nothing follows the line that says how it ended.
    assert lines[-1] == (
        f"topd: stopped by {name} and saved after step {step}; rerun the "
        "command to resume"
    )
    monkeypatch.setattr(stopping, "_asked", 0)
    assert_resumes(trained, tmp_path / "run", settings, step)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_evaluation_is_saved(
    trained, settings, small_arguments, tmp_path
):
    (last,) = stopped(small_arguments, tmp_path, "evaluate", "SIGTERM")
    assert last == (
        "topd: stopped by SIGTERM and saved after step 4; rerun the command "
        "to resume"
    )
    assert_resumes(trained, tmp_path, settings, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "name"),
    [("compile", "SIGINT"), ("grade", "SIGINT")],
)
def test_elsewhere_a_signal_stops_at_once(
    small_arguments, tmp_path, phase, name
):
    said = stopped(small_arguments, tmp_path, phase, name)
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


def test_an_answer_that_fails_is_one_line(monkeypatch, capfd):
    def full(_):
        raise OSError(28, "No space left on device", "/full")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(stopping, "_explain", main._one_line)
    monkeypatch.setattr(stopping, "_resumes", True)
    monkeypatch.setattr(os, "_exit", leave)
    with stopping.answered_by(full), pytest.raises(SystemExit) as left:
        stopping._respond(signal.SIGTERM)
    assert left.value.code == 2
    assert capfd.readouterr().err == (
        "topd: [Errno 28] No space left on device: '/full'; make room and "
        "rerun the command to resume\n"
    )


def test_as_a_function_nothing_is_watched():
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
