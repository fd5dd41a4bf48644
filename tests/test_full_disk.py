"""Storage that fails while a run writes: one line, and nothing is lost."""

import contextlib
import resource
import shutil
import subprocess

import jax
import pytest
from small_run import assert_same_run

from topd_jax.training import loop
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.config import GuardSettings
from topd_jax.training.logging import Logs
from topd_jax.training.watch import Watch


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond a size: the system refuses with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many bytes at the place of the run."""
    with contextlib.ExitStack() as stack:

        def mount(options):
            place = tmp_path / "run"
            place.mkdir(exist_ok=True)
            line = ["mount", "-t", "tmpfs", "-o", options, "none", place]
            try:
                subprocess.run(line, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("needs the right to mount")
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            return place

        yield mount


def saving(monkeypatch, at, fault):
    """Calls ``fault`` before the checkpoint of a step is saved."""
    plain = loop.Run.save

    def save(self):
        if self.step == at:
            for before in (self.checkpoints, self.best):
                before.wait()  # an older one may still be being written
            fault()
        plain(self)

    monkeypatch.setattr(loop.Run, "save", save)


def test_a_failed_background_write_is_told_once_and_the_run_goes_on(
    refused, topd, command, trained, tmp_path, monkeypatch
):
    train = command("train", "--config.log.tensorboard=True")
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        limit = largest_file(12_000)
        saving(patch, 4, lambda: stack.enter_context(limit))
        line = refused(*train, bars=True)
    assert "/checkpoints/4" in line and "File too large" in line
    assert "; raise the limit on the size of a file (ulimit -f) and re" in line
    places = (tmp_path / "run" / "checkpoints").iterdir()
    assert {p.name for p in places if p.name.isdigit()} == {"2"}
    topd(*train)
    assert_same_run(trained, tmp_path / "run")


def test_a_full_disk_loses_nothing(
    refused, topd, command, trained, tmp_path, monkeypatch, disk
):
    place = disk("size=8m")

    def fill(rest=100_000):
        size = shutil.disk_usage(place).free - rest
        (place / f"filler-{rest}").write_bytes(bytes(size))

    with monkeypatch.context() as patch:
        saving(patch, 4, fill)
        line = refused(*command("train"), bars=True)
    assert "No space left on device" in line
    assert line.endswith("resumes from the last checkpoint")
    fill(rest=0)  # where even the logs cannot be cut back
    before = (place / "metrics.jsonl").read_bytes()
    line = refused(*command("train"))
    assert "No space left on device" in line
    assert (place / "metrics.jsonl").read_bytes() == before
    for filler in place.glob("filler-*"):
        filler.unlink()
    topd(*command("train"))
    assert_same_run(trained, place)


def test_a_directory_that_is_read_only(refused, command, disk):
    place = disk("ro")
    line = refused(*command("train"))
    assert f"{place}" in line and "Read-only file system" in line
    assert "; mount it for writing and rerun the command" in line


def test_a_file_in_the_way_of_a_directory(refused, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    line = refused(*command("train"))
    assert f"File exists: '{tmp_path / 'run' / 'checkpoints'}'" in line


def test_no_log_waits_for_a_disk_that_is_full(tmp_path):
    logs = Logs(
        tmp_path, step=-1, tensorboard=True,
        watch=Watch(GuardSettings(), max_skipped=10),
    )  # fmt: skip
    row = {f"number_{i}": 0.0 for i in range(20)}

    def write():
        for step in range(100):
            logs.write("metrics", {"step": step, **row})

    with largest_file(20_000), pytest.raises(OSError, match="too large"):
        write()


def test_checksums_that_cannot_be_written_commit_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saved = Checkpoints(tmp_path, 2)
    monkeypatch.setattr(
        "topd_jax.models.io.checksums.write_checksums", full
    )  # fmt: skip
    saved.save(2, {"step": jax.numpy.ones(())}, jax.random.key(0), {})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}"):
        saved.wait()
    assert Checkpoints(tmp_path, 2).newest_intact() is None
