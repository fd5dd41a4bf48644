"""tpu.sh: its dry run, and its runs against a stand-in gcloud that records."""

import pathlib
import shlex
import shutil
import subprocess
import time

import pytest
from launch_desk import Desk, find_shellcheck

WHERE = ["--name", "t1", "--zone", "us-west4-a"]


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    return Desk(tmp_path)


def dry_run(desk: Desk, *args: str) -> list[list[str]]:
    """The commands that a dry run prints, as words; none was called."""
    result = desk.run("launch/tpu.sh", *args, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not desk.calls_file.exists()
    assert not (desk.top / "runs").exists()
    words, commands = shlex.split(result.stdout), []
    for word in words:
        if word in ("gcloud", "git", "mkdir"):
            commands.append([])
        commands[-1].append(word)
    return commands


def worker_scripts(commands: list[list[str]]) -> list[str]:
    return [
        word.removeprefix("--command=")
        for command in commands
        for word in command
        if word.startswith("--command=")
    ]


def test_worker_scripts_pass_shellcheck(desk: Desk) -> None:
    for command in ("install", "run", "logs", "stop"):
        config = ["--config", "configs/tiny.py"] * (command == "run")
        calls = dry_run(desk, command, *WHERE, *config)
        for script in worker_scripts(calls):
            result = subprocess.run(
                [find_shellcheck(), "--shell=bash", "-"],
                input=script + "\n",
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["create", "--type", "v5litepod-8", "--spot"],
            "tpu-vm create t1 --accelerator-type=v5litepod-8 "
            "--version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a",
        ),
        (
            ["create", "--type=v6e-16", "--version=mine", "--project=p"],
            "tpu-vm create t1 --accelerator-type=v6e-16 "
            "--version=mine --zone=us-west4-a --project=p",
        ),
        (
            ["create", "--type", "v4-32", "--queued", "--reserved"],
            "queued-resources create t1 --node-id=t1 "
            "--accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base "
            "--reserved --zone=us-west4-a",
        ),
        (
            ["logs", "--worker", "3"],
            "tpu-vm ssh t1 --worker=3 "
            "'--command=tail -n 50 -F \"$HOME/topd_jax/train.log\"' "
            "--zone=us-west4-a",
        ),
        (["delete"], "tpu-vm delete t1 --quiet --zone=us-west4-a"),
        (
            ["delete", "--queued"],
            "queued-resources delete t1 --force --quiet --zone=us-west4-a",
        ),
    ],
)
def test_dry_run_prints_the_command(
    desk: Desk, args: list[str], expected: str
) -> None:
    (command,) = dry_run(desk, *args, *WHERE)
    assert command == ["gcloud", "compute", "tpus", *shlex.split(expected)]


def test_dry_run_of_all_prints_every_command_in_order(desk: Desk) -> None:
    commands = dry_run(
        *(desk, "all", *WHERE, "--type", "v5p-8", "--branch", "main"),
        *("--config", "configs/tiny.py", "--project", "p"),
    )
    archive = f"{desk.top}/runs/launch/t1.tar.gz"
    assert [c[:5] for c in commands] == [
        ["gcloud", "compute", "tpus", "tpu-vm", "create"],
        ["mkdir", "-p", f"{desk.top}/runs/launch"],
        ["git", "-C", str(desk.top), "archive", "--format=tar.gz"],
        ["gcloud", "compute", "tpus", "tpu-vm", "scp"],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
    ]
    assert commands[2][5:] == ["--prefix=src/", f"--output={archive}", "main"]
    assert commands[3][5:7] == [archive, "t1:topd_jax.tar.gz"]
    workers = [c[6] for c in commands[4:]]
    assert workers == ["--worker=all", "--worker=all", "--worker=0"]
    clouds = [c for c in commands if c[0] == "gcloud"]
    assert all(c[-2:] == ["--zone=us-west4-a", "--project=p"] for c in clouds)
    assert "bash launch/setup.sh tpu" in worker_scripts(commands)[0]


def wait_for(condition, what: str) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within 10 s")


def test_create_install_run_log_stop_delete(desk: Desk) -> None:
    desk.commit()
    (desk.top / "configs" / "new.py").touch()
    tpu = "launch/tpu.sh"
    home = desk.worker / "topd_jax"
    created = desk.run(tpu, "create", *WHERE, "--type", "v5litepod-16")
    assert created.returncode == 0, created.stderr

    early = desk.run(tpu, "run", *WHERE, "--config", "configs/tiny.py")
    assert early.returncode == 2
    assert "topd_jax is not here: tpu.sh install" in early.stderr

    (home / "src").mkdir()
    (home / "src" / "left_over.py").touch()
    installed = desk.run(tpu, "install", *WHERE)
    assert installed.returncode == 0, installed.stderr
    assert "changes that are not committed" in installed.stderr
    assert not (home / "src" / "left_over.py").exists()
    assert not (home / "src" / "configs" / "new.py").exists()
    assert desk.installs() == [".[tpu]"]

    lost = desk.run(tpu, "run", *WHERE, "--config", "configs/new.py")
    assert lost.returncode == 2
    assert "no config configs/new.py" in lost.stderr

    values = ["--config.name=it's $HOME", "a  b", "", "--spot"]
    started = desk.run(
        *(tpu, "run", *WHERE, "--config", "configs/tiny.py:small"),
        *("--", *values),
        SLEEP="60",
    )
    assert started.returncode == 0, started.stderr
    log = home / "train.log"
    wait_for(lambda: "topd speaks" in log.read_text(), "the start")
    # It returned while the training goes on.
    process = (home / "train.pid").read_text().strip()
    assert pathlib.Path("/proc", process).exists()
    (call,) = desk.calls("topd")
    assert call[1:3] == ["train", "--distributed"]
    assert call[3:5] == ["--config", "configs/tiny.py:small"]
    assert call[5:] == ["--workdir", f"{home}/runs/t1", *values]

    twice = desk.run(tpu, "run", *WHERE, "--config", "configs/tiny.py")
    assert twice.returncode == 2
    assert "see logs, or stop it" in twice.stderr
    assert desk.run(tpu, "install", *WHERE).returncode == 2
    assert (home / "src").exists()

    stopped = desk.run(tpu, "stop", *WHERE)
    assert stopped.returncode == 0, stopped.stderr
    logged = desk.run(tpu, "logs", *WHERE, "--no-follow")
    assert logged.stdout.startswith("topd speaks\n")
    assert logged.stdout.endswith("\ntopd: exit code 143\n")
    assert "nothing runs" in desk.run(tpu, "stop", *WHERE).stdout
    desk.calls()
    assert desk.run(tpu, "delete", *WHERE).returncode == 0
    assert [c[4:6] for c in desk.calls("gcloud")] == [["delete", "t1"]]


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        ("/mnt/my disk", "/mnt/my disk"),
        ("runs/$x", "{home}/topd_jax/runs/$x"),
    ],
)
def test_workdir_of_the_worker(desk: Desk, workdir: str, expected: str) -> None:
    config = ["--config", "configs/tiny.py", "--workdir", workdir]
    (script,) = worker_scripts(dry_run(desk, "run", *WHERE, *config))
    last = script.splitlines()[-1]
    shown = subprocess.run(
        ["bash", "-c", f"start() {{ printf '%s\\n' \"$@\"; }}; {last}"],
        env={"HOME": "/home/me"},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.splitlines()[-1] == expected.format(home="/home/me")


@pytest.mark.parametrize(
    ("fail", "calls"),
    [("create", 1), ("scp", 2), ("setup.sh", 3), ("topd train", 4)],
)
def test_all_stops_at_the_first_failure_with_its_code(
    desk: Desk, fail: str, calls: int
) -> None:
    desk.commit()
    result = desk.run(
        *("launch/tpu.sh", "all", *WHERE, "--type", "v4-8"),
        *("--config", "configs/tiny.py"),
        FAIL=fail,
    )
    assert result.returncode == 7
    assert "tpu.sh: exit code 7 from: gcloud compute tpus" in result.stderr
    assert len(desk.calls("gcloud")) == calls


@pytest.mark.parametrize("command", ["logs", "stop", "delete"])
def test_exit_code_of_gcloud_is_that_of_tpu(desk: Desk, command: str) -> None:
    result = desk.run("launch/tpu.sh", command, *WHERE, FAIL="gcloud")
    assert result.returncode == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: bash launch/tpu.sh COMMAND"),
        (["fly"], "unknown command fly: one of create, install"),
        (["create"], "create needs --name, for instance --name my-tpu"),
        (["logs", "--name", "a"], "logs needs --zone, for instance --zone us"),
        (["create", *WHERE], "create needs --type, for instance --type v5l"),
        (["run", *WHERE], "run needs --config, for instance --config conf"),
        (["create", *WHERE, "--type=x9-1"], "--type=x9-1 has no known runtime"),
        (["create", *WHERE, "--type"], "--type needs a value"),
        (["run", *WHERE, "--config", "--spot"], "--config needs a value"),
        (["run", *WHERE, "--steps=3"], "unknown argument --steps: see --help"),
        (["logs", *WHERE, "--worker=all"], "--worker=all must be a worker's"),
        (["delete", *WHERE, "--", "x"], "delete takes no arguments after --"),
        (
            ["create", *WHERE, "--type=v4-8", "--spot", "--reserved"],
            "--spot and --reserved exclude each other",
        ),
        (
            ["run", *WHERE, "--config=c.py", "--workdir=gs://bucket/t1"],
            "--workdir=gs://bucket/t1 must be a directory on the workers",
        ),
        (
            ["all", *WHERE, "--type=v4-8", "--config=c.py", "--queued"],
            "all cannot wait for a queued resource",
        ),
    ],
)
def test_wrong_usage_is_told_with_the_way_out(
    desk: Desk, args: list[str], message: str
) -> None:
    result = desk.run("launch/tpu.sh", *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not desk.calls_file.exists()


def test_unknown_branch_and_missing_gcloud(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    desk.commit()
    branch = desk.run("launch/tpu.sh", "install", *WHERE, "--branch", "nope")
    assert branch.returncode == 2
    assert "--branch=nope is no commit" in branch.stderr

    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname"):
        (few / tool).symlink_to(shutil.which(tool))
    missing = desk.run("launch/tpu.sh", "delete", *WHERE, PATH=str(few))
    assert missing.returncode == 2
    assert "gcloud is not on PATH: install the Google" in missing.stderr
