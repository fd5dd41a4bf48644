"""tpu.sh keep: until the training is done, whatever the cloud does."""

import os
import pathlib
import signal
import subprocess

import pytest
from launch_desk import Desk, wait_for
from launch_desk import desk as empty_desk

__all__ = ["empty_desk"]
WHERE = ["--name", "t1", "--zone", "us-west4-a"]
KEEP = [
    "launch/tpu.sh", "keep", *WHERE, "--type", "v5litepod-16", "--every=0.02",
    "--config", "configs/tiny.py", "--workdir", "/mnt/d/t1",
]  # fmt: skip


@pytest.fixture
def desk(empty_desk: Desk) -> Desk:
    empty_desk.commit()
    return empty_desk


def keep(
    desk: Desk, *more: str, plays: str = "0:0"
) -> tuple[subprocess.CompletedProcess, list[str], int]:
    """Run the keeper in the foreground: gcloud's verbs, and starts of topd."""
    done = desk.run(*KEEP, "--foreground", *more, PLAYS=plays)
    verbs, starts = [], 0
    for call in desk.calls("gcloud", "topd"):
        if call[0] == "topd":  # in the background, between any two calls
            starts += 1
        elif call[4] != "ssh" and [call[4]] != verbs[-1:]:
            verbs.append(call[4])
    assert not list((desk.top / "runs" / "launch").glob("*.err*"))
    return done, verbs, starts


def test_it_creates_installs_starts_and_sees_the_end(desk: Desk) -> None:
    done, verbs, starts = keep(desk)
    assert done.returncode == 0, done.stderr
    assert verbs == ["describe", "create", "describe", "scp", "describe"]
    assert starts == 1
    assert done.stdout.endswith("the training is done\n")
    # Rerun, it finds all done; and deletes where it is told to.
    done, verbs, starts = keep(desk, "--delete-when-done")
    assert done.returncode == 0 and verbs == ["describe", "delete"]
    assert starts == 0


def test_it_resumes_after_a_preemption(desk: Desk) -> None:
    """With the code that it began with."""
    look = "topd-state|{}|"
    desk.troubles(
        *(look.format(does) for does in ("pass", "pass", "preempt")),
    )
    commits = (
        f"cd '{desk.top}' && touch configs/new.py && git add . "
        "&& git -c user.name=t -c user.email=t@example.com "
        "commit -qm new --allow-empty"
    )
    done, verbs, starts = keep(
        desk, "--prepare", f"{commits} # a comment", plays="60:0 0:0"
    )
    assert done.returncode == 0, done.stderr
    assert "the slice: PREEMPTED" in done.stdout
    assert "failure" not in done.stdout
    assert starts == 2 and verbs.count("scp") == 2
    assert verbs.count("create") == 2 and verbs.count("delete") == 1
    source = desk.worker / "topd_jax" / "src" / "configs"
    assert [p.name for p in source.glob("[nt]*")] == ["tiny.py"]


def test_it_waits_in_the_queue_and_requests_again(desk: Desk) -> None:
    queue = "queued-resources describe|say|"
    desk.troubles(
        *(queue + "ACCEPTED", queue + "FAILED", queue + "PROVISIONING"),
    )
    done, verbs, _ = keep(desk, "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    log = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert log[:7] == [
        "the slice: ACCEPTED", "the slice: FAILED",
        "deleting the slice, to resume on another one",
        "the slice: PROVISIONING", "the slice: GONE", "creating t1",
        "the slice: READY",
    ]  # fmt: skip
    assert verbs[:4] == ["describe", "delete", "describe", "create"]


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("RESOURCE_EXHAUSTED: There is no more capacity", "no capacity; retry"),
        ("Quota limit has been exceeded", "failure 2 of at most 2: the quota"),
        ("ALREADY_EXISTS", ""),
    ],
)
def test_it_retries_to_create(desk: Desk, reason: str, says: str) -> None:
    desk.troubles(*[f"tpu-vm create|fail|{reason}"] * 2)
    done, verbs, _ = keep(desk, "--restarts=2")
    assert done.returncode == 0, done.stderr
    assert verbs.count("create") == 3
    assert says in done.stdout
    assert ("failure" in done.stdout) == ("failure" in says)
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (
            "tpu-vm create|fail|ERROR: PERMISSION_DENIED",
            "would refuse it again",
        ),
        ("tpu-vm create|fail|the tubes are blocked", "this was failure 1, and"),
        ("describe|say|STOPPED", "t1 is stopped; start it"),
    ],
)
def test_it_gives_up_where_retrying_is_useless(
    desk: Desk, trouble: str, why: str
) -> None:
    desk.troubles(trouble)
    done, _, starts = keep(desk, "--restarts=0")
    assert done.returncode == 1 and starts == 0
    assert why in done.stdout


def test_a_dropped_ssh_is_no_failure_of_the_training(desk: Desk) -> None:
    drop = "|fail|ssh: connection closed by remote host"
    desk.troubles(
        "topd-state|pass|", "topd-state|pass|", *["topd-state" + drop] * 2,
        "tpu-vm describe" + drop, "setsid" + drop,
    )  # fmt: skip
    # A start that breaks off is one, and is repeated.
    done, verbs, starts = keep(desk, "--restarts=1")
    assert done.returncode == 0, done.stdout
    assert starts == 1 and verbs.count("create") == 1
    assert "the workers do not answer" in done.stdout
    assert "failure 1 of at most 1: run" in done.stdout


@pytest.mark.parametrize(
    ("plays", "code", "last", "starts"),
    [
        ("0:1 0:143 0:1 0:0", 0, "the training is done", 4),  # SIGTERM: none
        ("0:1", 1, "this was failure 3, and --restarts is 2", 3),
        ("0:2", 1, "topd refused its arguments or its config", 1),
    ],
)
def test_a_training_that_fails_is_restarted_at_most_so_often(
    desk: Desk, plays: str, code: int, last: str, starts: int
) -> None:
    done, _, begun = keep(desk, "--restarts=2", plays=plays)
    assert done.returncode == code, done.stdout
    assert last in done.stdout.splitlines()[-1]
    assert begun == starts
    assert f"topd: exit code {plays[2]}" in done.stderr  # the end of the log


def test_what_was_refused_is_tried_again_by_another_keeper(desk: Desk) -> None:
    """What the training lacked may be there by now."""
    assert keep(desk, plays="0:2")[0].returncode == 1
    done, _, starts = keep(desk, plays="0:2 0:0")
    assert done.returncode == 0 and starts == 1, done.stdout


def test_a_start_that_breaks_off_is_not_done_as_the_command_before(
    desk: Desk,
) -> None:
    assert keep(desk)[0].returncode == 0
    once = "[ -e tried ] || ! touch tried"
    done, _, starts = keep(desk, "--prepare", once, "--", "--config.seed=1")
    assert done.returncode == 0 and starts == 1, done.stdout
    assert "failure 1 of at most 10: run" in done.stdout


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
    wait_for(lambda: "running" in screen.read_text())
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
    other = desk.run(*KEEP, "--no-follow", "--delete-when-done")
    assert other.returncode == 2
    assert f"process {pid} keeps t1 with other flags" in other.stderr
    stopped = desk.run("launch/tpu.sh", "stop", *WHERE)
    assert f"stopped the keeper (process {pid})" in stopped.stdout
    wait_for(lambda: not pathlib.Path("/proc", str(pid)).exists())
    assert log.with_suffix(".exit").read_text() == "143\n"
    desk.calls()
    # Nothing starts it again; the same command continues from what there is.
    done = desk.run(*KEEP, "--delete-when-done", PLAYS="60:0 0:0")
    assert done.returncode == 0, done.stdout + done.stderr
    # What follows shows the new lines of the log alone.
    assert "creating t1" not in done.stdout
    assert done.stdout.endswith("the training is done\n")
    verbs = {call[4] for call in desk.calls("gcloud")}
    assert "delete" in verbs and "create" not in verbs


def test_stop_ends_a_keeper_in_the_foreground_too(desk: Desk) -> None:
    """Else it starts the training again, or the slice that was deleted."""
    front = subprocess.Popen(
        ["bash", str(desk.top / "launch" / "tpu.sh"), *KEEP[1:],
         "--foreground"],
        env=desk.environment | {"PLAYS": "60:0"}, cwd=desk.top.parent,
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    shown = iter(front.stdout.readline, "")
    assert any("the training: running" in line for line in shown)
    twice = desk.run(*KEEP, "--foreground")
    assert twice.returncode == 2
    assert f"process {front.pid} keeps t1 already" in twice.stderr
    stopped = desk.run("launch/tpu.sh", "stop", *WHERE)
    assert stopped.returncode == 0, stopped.stderr
    assert f"stopped the keeper (process {front.pid})" in stopped.stdout
    assert front.wait(timeout=30) == 143
    assert "starting" not in front.stdout.read()


def test_those_who_follow_get_the_keepers_exit_code(desk: Desk) -> None:
    # A training of another command line is left alone.
    for command in (
        ["create", "--type=v5litepod-16"],
        ["install"],
        ["run", "--config", "configs/tiny.py"],
    ):
        done = desk.run("launch/tpu.sh", *command, *WHERE, PLAYS="60:0")
        assert done.returncode == 0, done.stderr
    done = desk.run(*KEEP)
    assert done.returncode == 1
    assert done.stdout.endswith("another training runs on the slice; tpu.sh "
                                "stop ends it\n")  # fmt: skip
    assert desk.run("launch/tpu.sh", "stop", *WHERE).returncode == 0
