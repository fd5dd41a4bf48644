"""tpu.sh, but for keep: its dry run, and its runs against a stand-in gcloud."""

import pathlib
import shlex
import shutil
import subprocess

import pytest
from launch_desk import Desk, desk, find_shellcheck, wait_for

__all__ = ["desk"]
TPU = "launch/tpu.sh"
WHERE = ["--name", "t1", "--zone", "us-west4-a"]
CONFIG = ["--config", "configs/tiny.py"]


def dry_run(desk: Desk, *args: str) -> list[list[str]]:
    """The commands that a dry run prints, as words; none was called."""
    result = desk.run(TPU, *args, "--dry-run")
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


def test_worker_scripts_pass_shellcheck(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    keep = [*WHERE, *CONFIG, "--type=v4-8", "--workdir=/mnt/d"]
    calls = dry_run(desk, "keep", *keep, "--prepare", "mount /mnt/d")
    calls += dry_run(desk, "logs", *WHERE) + dry_run(desk, "stop", *WHERE)
    files = []
    for index, script in enumerate(worker_scripts(calls)):
        files.append(tmp_path / f"{index}.sh")
        files[-1].write_text(script + "\n")
    assert len(files) == 5
    result = subprocess.run(  # SC2329: not every script calls every function
        [find_shellcheck(), "--shell=bash", "--exclude=SC2329", *files],
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
        *(desk, "all", *WHERE, *CONFIG, "--type", "v5p-8"),
        *("--branch", "main", "--project", "p", "--worker", "3"),
    )
    verbs = ["create", "-p", "--format=tar.gz", "scp", "ssh", "ssh", "ssh"]
    assert [c[1] if c[0] == "mkdir" else c[4] for c in commands] == verbs
    assert commands[2][-1] == "main"
    assert [c[6] for c in commands[4:]] == [
        *["--worker=all", "--worker=all", "--worker=3"]
    ]
    clouds = [c for c in commands if c[0] == "gcloud"]
    assert all(c[-2:] == ["--zone=us-west4-a", "--project=p"] for c in clouds)
    assert worker_scripts(commands)[-1].endswith("tail -n 50 -F train.log")


def test_create_install_run_log_stop_delete(desk: Desk) -> None:
    desk.commit()
    (desk.top / "configs" / "new.py").touch()
    home = desk.worker / "topd_jax"
    created = desk.run(TPU, "create", *WHERE, "--type", "v5litepod-16")
    assert created.returncode == 0, created.stderr

    early = desk.run(TPU, "run", *WHERE, *CONFIG)
    assert early.returncode == 2
    assert "topd_jax is not installed: run tpu.sh install" in early.stderr

    (home / "src").mkdir()
    (home / "src" / "left_over.py").touch()
    installed = desk.run(TPU, "install", *WHERE)
    assert installed.returncode == 0, installed.stderr
    assert "the checkout has uncommitted changes" in installed.stderr
    assert not (home / "src" / "left_over.py").exists()
    assert not (home / "src" / "configs" / "new.py").exists()
    assert desk.installs() == [".[tpu]"]

    lost = desk.run(TPU, "run", *WHERE, "--config", "configs/new.py")
    assert lost.returncode == 2
    assert "no config configs/new.py" in lost.stderr

    values = ["--config.name=it's $HOME", "a  b", "", "--spot"]
    started = desk.run(
        *(TPU, "run", *WHERE, "--config", "configs/tiny.py:small"),
        *("--", *values),
        PLAYS="60:0",
    )
    assert started.returncode == 0, started.stderr
    log = home / "train.log"
    wait_for(lambda: "topd speaks" in log.read_text())
    # It returned while the training goes on.
    process = (home / "train.pid").read_text().strip()
    assert pathlib.Path("/proc", process).exists()
    (call,) = desk.calls("topd")
    assert call[1:3] == ["train", "--distributed"]
    assert call[3:5] == ["--config", "configs/tiny.py:small"]
    assert call[5:] == ["--workdir", f"{home}/runs/t1", *values]

    for command in (["run", *CONFIG], ["install"]):
        twice = desk.run(TPU, *command, *WHERE)
        assert twice.returncode == 2
        assert "follow it with logs, or stop it" in twice.stderr
    assert (home / "src").exists()

    stopped = desk.run(TPU, "stop", *WHERE)
    assert stopped.returncode == 0, stopped.stderr
    logged = desk.run(TPU, "logs", *WHERE, "--no-follow")
    assert logged.stdout == "topd speaks\ntopd: exit code 143\n"
    assert "no training runs" in desk.run(TPU, "stop", *WHERE).stdout
    desk.calls()
    assert desk.run(TPU, "delete", *WHERE).returncode == 0
    assert [c[4:6] for c in desk.calls("gcloud")] == [["delete", "t1"]]


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        ("/mnt/my disk", "/mnt/my disk"),
        ("runs/$x", "/home/me/topd_jax/runs/$x"),
    ],
)
def test_workdir_of_the_worker(desk: Desk, workdir: str, expected: str) -> None:
    calls = dry_run(desk, "run", *WHERE, *CONFIG, "--workdir", workdir)
    last = worker_scripts(calls)[0].splitlines()[-1]
    shown = subprocess.run(
        ["bash", "-c", f"start() {{ printf '%s\\n' \"$@\"; }}; {last}"],
        env={"HOME": "/home/me"},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["run", "--topd", "eval"], "start topd eval --distributed --config"),
        (["paper", "--type=v4-8", "--workdir=/mnt/d"],
         "start bash launch/paper.sh --distributed --config configs/tiny.py"),
    ],
)  # fmt: skip
def test_any_command_and_the_whole_recipe_run(
    desk: Desk, args: list[str], expected: str
) -> None:
    calls = dry_run(desk, *args, *WHERE, *CONFIG)
    lines = "".join(worker_scripts(calls)).splitlines()
    (line,) = [x for x in lines if x.startswith("start ")]
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("fail", "calls"), [("create", 1), ("scp", 2), ("setup.sh", 3)]
)
def test_all_stops_at_the_first_failure_with_its_code(
    desk: Desk, fail: str, calls: int
) -> None:
    desk.commit()
    result = desk.run(TPU, "all", *WHERE, *CONFIG, "--type=v4-8", FAIL=fail)
    assert result.returncode == 7
    assert "tpu.sh: exit code 7 from: gcloud compute tpus" in result.stderr
    assert len(desk.calls("gcloud")) == calls


KEEP = ["keep", *WHERE, *CONFIG, "--type=v4-8"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: bash launch/tpu.sh COMMAND"),
        (["fly"], "unknown command fly: one of create, install"),
        (["create"], "create needs --name, for instance --name my-tpu"),
        (["create", *WHERE, "--type=x9-1"], "--type=x9-1 has no known runtime"),
        (["run", *WHERE, "--config", "--spot"], "--config needs a value"),
        (["run", *WHERE, "--steps=3"], "unknown argument --steps: see --help"),
        (["logs", *WHERE, "--worker=all"], "--worker=all must be a number, 0"),
        (["delete", *WHERE, "--", "x"], "delete takes no arguments after --"),
        (
            ["create", *WHERE, "--type=v4-8", "--spot", "--reserved"],
            "--spot and --reserved exclude each other",
        ),
        (
            ["all", *WHERE, *CONFIG, "--type=v4-8", "--queued"],
            "all cannot wait for a queued resource: use keep",
        ),
        ([*KEEP, "--workdir=runs/t1"], "--workdir=runs/t1 is lost with the"),
        ([*KEEP, "--workdir=/d", "--every=soon"], "--every=soon must be a"),
    ],
)
def test_wrong_usage_is_told_with_the_way_out(
    desk: Desk, args: list[str], message: str
) -> None:
    result = desk.run(TPU, *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not desk.calls_file.exists()


def test_unknown_branch_and_missing_gcloud(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    desk.commit()
    branch = desk.run(TPU, "install", *WHERE, "--branch", "nope")
    assert branch.returncode == 2
    assert "--branch=nope is no commit" in branch.stderr

    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname", "basename"):
        (few / tool).symlink_to(shutil.which(tool))
    missing = desk.run(TPU, "delete", *WHERE, PATH=str(few))
    assert missing.returncode == 2
    assert "gcloud is not on PATH: install the Google" in missing.stderr
