"""local.sh --processes N: several stand-ins of topd, started and stopped."""

import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
from launch_desk import TOP, Desk

LOCAL = "launch/local.sh"


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    return Desk(tmp_path)


def test_every_process_runs_the_same_command(desk: Desk) -> None:
    result = desk.run(LOCAL, "--config.seed=3", "--processes", "3", "a b")
    assert result.returncode == 0, result.stderr
    calls = sorted(desk.calls("topd"), key=lambda c: c[-1])
    coordinator = calls[0][-3]
    assert re.fullmatch(r"--coordinator=localhost:\d+", coordinator)
    assert calls == [
        [
            *["topd", "train", "--config", "configs/tiny.py"],
            *["--workdir", "runs/tiny-processes", "--config.seed=3", "a b"],
            *[coordinator, "--processes=3", f"--process={i}"],
        ]
        for i in range(3)
    ]
    spoken = [x for x in result.stdout.splitlines() if x.startswith("[")]
    assert sorted(spoken) == [f"[{i}] topd speaks" for i in range(3)]


# Were a process left, it would hold the output open, and run() would time out.
def test_when_one_fails_all_are_stopped(desk: Desk) -> None:
    result = desk.run(
        LOCAL, "--processes=3", FAIL="--process=1", SLEEP="300"
    )  # fmt: skip
    assert result.returncode == 7
    assert (
        "local.sh: process 1 ended with exit code 7: stopping the others"
        in result.stderr
    )
    assert "killing" not in result.stderr


def stop(desk: Desk, number: int, **env: str) -> tuple[list[str], str, int]:
    """Signals two processes that have spoken: last words, errors and code."""
    assert desk.run(LOCAL, "--setup-only").returncode == 0
    script = subprocess.Popen(
        ["bash", str(desk.top / LOCAL), "--processes=2"],
        env=desk.environment | {"SLEEP": "300"} | env,
        cwd=desk.top.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        # A job in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    spoken = {script.stdout.readline() for _ in range(2)}
    assert spoken == {"[0] topd speaks\n", "[1] topd speaks\n"}
    script.send_signal(number)
    out, err = script.communicate(timeout=60)
    return sorted(out.splitlines()), err, script.returncode


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_stops_all(desk: Desk, number: int, code: int) -> None:
    last_words, err, got = stop(desk, number, POLITE="1")
    assert got == code
    assert last_words == ["[0] topd leaves", "[1] topd leaves"]
    assert "killing" not in err


def test_what_does_not_stop_is_killed(desk: Desk) -> None:
    _, err, code = stop(desk, signal.SIGTERM, DEAF="1", TOPD_GRACE="1")
    assert code == 143
    assert "still there after 1 s: killing them" in err


def test_lines_say_whose_they_are_and_bars_too() -> None:
    several = shlex.quote(str(TOP / "launch" / "several.sh"))
    result = subprocess.run(
        ["bash", "-c", f"source {several}; prefix_lines 3"],
        env={"TOPD_ENV": str(pathlib.Path(sys.executable).parents[1])},
        input=b"a\r b\nc\xff\n\nlast",
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.decode().splitlines()
    assert lines == ["[3] a", "[3]  b", "[3] c\ufffd", "[3] ", "[3] last"]


def test_dry_run_prints_every_command(desk: Desk) -> None:
    several = desk.run(LOCAL, "--dry-run", "--processes=2", "a b")
    alone = desk.run(LOCAL, "--dry-run", "a b")
    assert not desk.calls_file.exists()
    commands = [shlex.split(line) for line in several.stdout.splitlines()]
    assert [c[-1] for c in commands] == ["--process=0", "--process=1"]
    assert all(c[:2] == ["topd", "train"] and "a b" in c for c in commands)
    assert shlex.split(alone.stdout) == [
        *["topd", "sweep", "--config", "configs/tiny.py"],
        *["--workdir", "runs/tiny", "a b"],
    ]


@pytest.mark.parametrize(
    ("args", "grace", "message"),
    [
        (["--processes"], "30", "--processes needs a value, for instance 2"),
        (["--processes=0"], "30", "--processes=0 must be a number in 1..999"),
        (["--processes", "two"], "30", "--processes=two must be a number"),
        (["--processes=2"], "soon", "TOPD_GRACE=soon must be a number of"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_set_up(
    desk: Desk, args: list[str], grace: str, message: str
) -> None:
    result = desk.run(LOCAL, *args, TOPD_GRACE=grace)
    assert result.returncode == 2
    assert message in result.stderr
    assert not desk.calls_file.exists()
