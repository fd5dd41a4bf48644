"""tpu.sh keep: until the training is done, whatever the cloud does."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
from launch_desk import Desk

WHERE = ["--name", "t1", "--zone", "us-west4-a"]
KEEP = [
    "launch/tpu.sh", "keep", *WHERE, "--type", "v5litepod-16", "--every=0.1",
    "--config", "configs/tiny.py", "--workdir", "/mnt/d/t1",
]  # fmt: skip


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    desk = Desk(tmp_path)
    desk.commit()
    return desk


def keep(
    desk: Desk, *more: str, plays: str = "0:0"
) -> tuple[subprocess.CompletedProcess, list[str], int]:
    """The keeper in the foreground: gcloud's verbs, and starts of topd."""
    done = desk.run(*KEEP, "--foreground", *more, PLAYS=plays)
    verbs, starts = [], 0
    for call in desk.calls("gcloud", "topd"):
        verb = call[4]
        if call[0] == "topd":  # in the background, between any two calls
            starts += 1
        elif verb != "ssh" and [verb] != verbs[-1:]:
            verbs.append(verb)
    assert not list((desk.top / "runs" / "launch").glob("*.errors*"))
    return done, verbs, starts


def test_it_makes_installs_starts_and_sees_the_end(desk: Desk) -> None:
    done, verbs, starts = keep(desk)
    assert done.returncode == 0, done.stderr
    assert verbs == ["describe", "create", "describe", "scp", "describe"]
    assert starts == 1
    assert done.stdout.endswith("the training is done\n")
    # Said again, it finds all done; and deletes where it is told to.
    done, verbs, starts = keep(desk, "--delete-when-done")
    assert done.returncode == 0 and verbs == ["describe", "delete"]
    assert starts == 0


def test_it_begins_again_after_a_preemption(desk: Desk) -> None:
    look = "topd-state|{}|"
    desk.troubles(
        *(look.format(does) for does in ("pass", "pass", "preempt")),
    )
    done, verbs, starts = keep(desk, plays="60:0 0:0")
    assert done.returncode == 0, done.stderr
    assert "the slice: PREEMPTED" in done.stdout
    assert "failure" not in done.stdout
    assert starts == 2 and verbs.count("scp") == 2
    assert verbs.count("create") == 2 and verbs.count("delete") == 1


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ("ERROR: RESOURCE_EXHAUSTED: There is no more capacity", False),
        ("ERROR: Quota limit TPUV5sLitepod has been exceeded", True),
        ("ERROR: ALREADY_EXISTS", False),
        ("ERROR: the tubes are blocked", True),
    ],
)
def test_it_asks_again_for_a_slice(desk: Desk, said: str, counts: bool) -> None:
    desk.troubles(*[f"tpu-vm create|fail|{said}"] * 2)
    done, verbs, _ = keep(desk, "--restarts=2")
    assert done.returncode == 0, done.stderr
    assert verbs.count("create") == 3
    assert done.stdout.count(": failure") == 0
    assert (" failure 2 of at most 2" in done.stdout) == counts
    assert said in done.stderr


def test_it_gives_up_where_asking_again_is_of_no_use(desk: Desk) -> None:
    desk.troubles("tpu-vm create|fail|ERROR: PERMISSION_DENIED: not yours")
    done, verbs, _ = keep(desk)
    assert done.returncode == 1 and verbs == ["describe", "create"]
    assert "gave up: asking again would not help" in done.stdout
    desk.troubles("describe|say|STOPPED")
    done, _, _ = keep(desk)
    assert done.returncode == 1 and "t1 is stopped; start it" in done.stdout


def test_it_waits_in_the_queue_and_begins_again(desk: Desk) -> None:
    queue = "queued-resources describe|say|{}"
    desk.troubles(
        *map(
            queue.format,
            ["ACCEPTED", "WAITING_FOR_RESOURCES", "FAILED", "PROVISIONING"],
        ),
    )
    done, verbs, _ = keep(desk, "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    told = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert told[:8] == [
        "the slice: ACCEPTED", "the slice: WAITING_FOR_RESOURCES",
        "the slice: FAILED",
        "the slice is FAILED: deleting it, to begin again from the checkpoint",
        "the slice: PROVISIONING", "the slice: GONE", "creating t1",
        "the slice: READY",
    ]  # fmt: skip
    assert verbs[:4] == ["describe", "delete", "describe", "create"]


def test_a_dropped_ssh_is_no_failure_of_the_training(desk: Desk) -> None:
    drop = "|fail|ssh: connection closed by remote host"
    desk.troubles(
        "topd-state|pass|", "topd-state|pass|", *["topd-state" + drop] * 3,
        "tpu-vm describe" + drop,
    )  # fmt: skip
    done, verbs, starts = keep(desk, "--restarts=0", plays="0.5:0")
    assert done.returncode == 0, done.stdout
    assert starts == 1 and verbs.count("create") == 1
    assert "the workers do not answer" in done.stdout


def test_a_start_that_breaks_off_is_started_once_more(desk: Desk) -> None:
    desk.troubles(
        "train.command|pass|", "train.command|pass|",
        "setsid|fail|ssh: connection closed by remote host",
    )  # fmt: skip
    done, _, _ = keep(desk, "--restarts=1")
    assert done.returncode == 0, done.stdout
    assert "failure 1 of at most 1: run" in done.stdout


def test_a_training_that_fails_is_started_again(desk: Desk) -> None:
    done, _, starts = keep(desk, plays="0:1 0:143 0:1 0:0")
    assert done.returncode == 0, done.stderr
    assert starts == 4
    assert "failure 2 of at most 10: the training ended" in done.stdout
    assert "failure 3" not in done.stdout  # SIGTERM is none
    assert "topd: exit code 1" in done.stderr  # the end of the log


@pytest.mark.parametrize(
    ("plays", "why", "starts"),
    [
        ("0:1", "failure 3, and --restarts is 2", 3),
        ("0:2", "what it was told is wrong", 1),
    ],
)
def test_it_gives_up_after_too_many_failures(
    desk: Desk, plays: str, why: str, starts: int
) -> None:
    done, _, begun = keep(desk, "--restarts=2", plays=plays)
    assert done.returncode == 1
    assert why in done.stdout
    assert begun == starts


def wait_for(condition, log: pathlib.Path) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(log.read_text())


def test_the_keeper_outlives_the_terminal_and_is_found_again(
    desk: Desk,
) -> None:
    log = desk.top / "runs" / "launch" / "t1.log"
    screen = desk.top / "screen.txt"
    # A terminal: a session that is hung up on while it follows.
    with screen.open("w") as shown:
        terminal = subprocess.Popen(
            ["bash", str(desk.top / "launch" / "tpu.sh"), *KEEP[1:]],
            env=desk.environment | {"PLAYS": "60:0"},
            cwd=desk.top.parent,
            stdout=shown,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # Also where these tests themselves run under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
    wait_for(lambda: "running" in screen.read_text(), log)
    os.killpg(terminal.pid, signal.SIGHUP)
    terminal.wait(timeout=30)
    shown = screen.read_text()
    assert "keeps t1" in shown and "creating t1" in shown
    pid = int(log.with_suffix(".pid").read_text())
    os.kill(pid, 0)
    # From a narrow terminal, too, where ps shows the beginning of a command.
    again = desk.run(*KEEP, "--no-follow", COLUMNS="40")
    assert again.returncode == 0, again.stderr
    assert f"process {pid} keeps t1" in again.stdout
    stopped = desk.run("launch/tpu.sh", "stop", *WHERE)
    assert f"the keeper (process {pid}) is ended" in stopped.stdout
    wait_for(lambda: not pathlib.Path("/proc", str(pid)).exists(), log)
    desk.calls()
    # Nothing starts it again; the same command goes on from what there is.
    done = desk.run(*KEEP, "--delete-when-done", PLAYS="60:0 0:0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the training is done" in done.stdout
    verbs = {call[4] for call in desk.calls("gcloud")}
    assert "delete" in verbs and "create" not in verbs


def test_who_follows_gets_the_keepers_exit_code(desk: Desk) -> None:
    done = desk.run(*KEEP, PLAYS="0:2")
    assert done.returncode == 1
    assert "what it was told is wrong" in done.stdout
    log = desk.top / "runs" / "launch" / "t1.log"
    assert done.stdout.endswith(log.read_text().splitlines()[-1] + "\n")


def test_another_training_is_left_alone(desk: Desk) -> None:
    config = ["--config", "configs/tiny.py"]
    for command, more in (
        ("create", ["--type=v5litepod-16"]),
        ("install", []),
        ("run", config),
    ):
        done = desk.run("launch/tpu.sh", command, *WHERE, *more, SLEEP="60")
        assert done.returncode == 0, done.stderr
    done, _, _ = keep(desk)
    assert done.returncode == 1
    assert "another training runs there" in done.stdout
    assert desk.run("launch/tpu.sh", "stop", *WHERE).returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir=runs/t1"], "--workdir=runs/t1 is lost with the slice"),
        (["--every=soon"], "--every=soon must be numbers, 0 or more"),
        (["--restarts=-1"], "--restarts=-1 and"),
    ],
)
def test_wrong_usage_is_told(desk: Desk, args: list[str], message: str) -> None:
    done = desk.run(*KEEP, *args)
    assert done.returncode == 2 and message in done.stderr
    assert not desk.calls_file.exists()


def test_dry_run_prints_a_round(desk: Desk) -> None:
    done = desk.run(*KEEP, "--dry-run", "--prepare", "mount /mnt/d")
    assert done.returncode == 0, done.stderr
    verbs = re.findall("gcloud compute tpus tpu-vm ([a-z]+)", done.stdout)
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "ssh", "delete"]
    assert "(mount /mnt/d)" in done.stdout
    assert not desk.calls_file.exists()
    assert not (desk.top / "runs").exists()
