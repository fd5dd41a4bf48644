"""One process at a time in a work directory; the dead are in nobody's way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from topd_jax.parallel import lock
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.config import GuardSettings
from topd_jax.training.logging import Logs
from topd_jax.training.watch import Watch

# Holds a directory until it is killed; it imports what the command does.
HOLDER = """
import pathlib, sys, time
from topd_jax.parallel import lock
lock._BEAT = 0.1
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = ["elsewhere", "its-boot", "pid:[1]"]


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory ``run``."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 1.0)
    monkeypatch.setattr(lock, "_POLL", 0.05)
    monkeypatch.setattr(lock, "_BEAT", 0.1)


def contents(directory: Path) -> dict:
    return json.loads((directory / lock.NAME).read_text())


def leave_behind(directory: Path, **changes: object) -> None:
    """A lock file whose holder does not beat."""
    directory.mkdir(exist_ok=True)
    owner = lock._identity() | changes
    (directory / lock.NAME).write_text(json.dumps(owner))


def test_a_living_holder_refuses_others_by_name(
    holder, tmp_path, topd, refused, small_arguments
):
    workdir = tmp_path / "run"
    for name in ("train", "generate"):
        line = refused(name, *small_arguments, f"--workdir={workdir}")
        assert f"{workdir} is in use by process {holder.pid} on " in line
        assert "since 20" in line and "(-c " in line
    assert [p.name for p in workdir.iterdir()] == [lock.NAME]
    # Who reads is not refused.
    topd("export", *small_arguments, f"--workdir={workdir}", "--which=start",
         f"--output={tmp_path / 'exported'}")  # fmt: skip
    # Who may go on still holds, and who cannot does not.
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="is in use by process"):
        lock.held(workdir).__enter__()
    holder.kill()  # and nobody has waited for it yet
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with lock.held(workdir):
        assert contents(workdir)["pid"] == os.getpid()
    assert not (workdir / lock.NAME).exists()


def test_a_holder_elsewhere_is_known_by_its_beats(
    holder, impatient, tmp_path, monkeypatch
):
    """And is refused, or waited for."""
    monkeypatch.setattr(lock, "_machine", lambda: ELSEWHERE)
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        lock.held(tmp_path / "run").__enter__()
    monkeypatch.setattr(lock.logging, "warning", lambda *_: holder.kill())
    with lock.held(tmp_path / "run", wait=True):
        assert contents(tmp_path / "run")["machine"] == ELSEWHERE


def test_a_lock_that_names_no_living_holder_is_free(tmp_path):
    """It was cut off; its holder is dead, or another has the number now."""
    dead = lock._identity() | {"pid": 2**22 + 1}
    other = dead | {"pid": os.getppid(), "started": "1"}
    for text in ("", '{"pid": 1, "mach', json.dumps(dead), json.dumps(other)):
        (tmp_path / lock.NAME).write_text(text)
        with lock.held(tmp_path):
            token = contents(tmp_path)["token"]
            assert contents(tmp_path)["pid"] == os.getpid()
            with lock.held(tmp_path):  # within a process it is held once
                assert contents(tmp_path)["token"] == token
            assert contents(tmp_path)["token"] == token
        assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path / "new"):
        assert contents(tmp_path / "new")["token"] != token
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shared", [True, False])
def test_whether_all_see_the_directory_is_compared(
    shared, tmp_path, monkeypatch
):
    """As the second of several processes does it: it takes nothing."""
    folder, told = tmp_path / "run", []
    if shared:
        folder.mkdir()
        (folder / lock.NAME).touch()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(lock.hosts, "from_first", lambda call: None)
    monkeypatch.setattr(lock.hosts, "require_same", told.append)
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    with lock.held(folder):
        assert told == [{f"sees {folder / lock.NAME}": shared}]


def test_who_lost_its_lock_writes_nothing_more(tmp_path):
    watch = Watch(GuardSettings(), max_skipped=1)
    saved = Checkpoints(tmp_path / "checkpoints", 2)
    with lock.held(tmp_path):
        logs = Logs(tmp_path, step=-1, tensorboard=False, watch=watch)
        logs.write("metrics", {"step": 1})
        leave_behind(tmp_path, machine=ELSEWHERE, pid=77)
        for held in lock._held.values():  # as after a long suspension
            held.beaten -= lock._PATIENCE
        for write in (
            lambda: logs.write("metrics", {"step": 2}), logs.sync, logs.close,
            lambda: saved.save(2, {}, jax.random.key(0), {}),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="over by process 77 on elsew"):
                write()
    saved.close()
    steps = (tmp_path / "metrics.jsonl").read_text().count("\n")
    assert steps == 1 and not list((tmp_path / "checkpoints").iterdir())
    assert contents(tmp_path)["pid"] == 77  # and left alone


# Four processes, of which one holds the directory.
TAKERS = """
import os, pathlib, sys, time
from topd_jax.parallel import lock
os.fork(), os.fork()
try:
    with lock.held(pathlib.Path(sys.argv[1])):
        os.write(1, b"held\\n")
        time.sleep(600)
except ValueError as error:
    os.write(1, str(error).encode() + b"\\n")
"""


def test_takers_at_once_are_one_after_the_other(tmp_path):
    leave_behind(tmp_path, pid=2**22 + 1)
    children = subprocess.Popen(
        [sys.executable, "-c", TAKERS, tmp_path],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = [children.stdout.readline() for _ in range(4)]
        refusals = [x for x in said if "is in use by process" in x]
        assert said.count("held\n") == 1 and len(refusals) == 3
    finally:
        os.killpg(children.pid, signal.SIGKILL)
        children.communicate()


def test_where_nothing_can_be_written_the_file_is_named(
    tmp_path, refused, command, monkeypatch
):
    def broken(*_):
        raise OSError(28, "No space left on device")

    def read_only(path, *_):
        raise OSError(30, "Read-only file system", str(path))

    for name, failing, way_out in (
        ("pwrite", broken, "; make room"),
        ("open", read_only, "; mount it for writing and re"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lock.os, name, failing)
            line = refused(*command("train"))
        assert f"'{tmp_path / 'run' / lock.NAME}'" in line and way_out in line
