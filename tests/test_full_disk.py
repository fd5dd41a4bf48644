"""Storage that fails while a run writes: one line, and nothing is lost."""

import contextlib
import resource

import pytest
from small_run import assert_same_run

from topd_jax.training import loop
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


def test_a_failed_background_write_is_told_once_and_the_run_goes_on(
    refused, topd, command, trained, tmp_path, monkeypatch
):
    train = command("train", "--config.log.tensorboard=True")
    plain = loop.Run.save

    def save(self):
        if self.step == 4:
            for before in (self.checkpoints, self.best):
                before.wait()  # an older one may still be being written
            stack.enter_context(largest_file(12_000))
        plain(self)

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(loop.Run, "save", save)
        line = refused(*train, bars=True)
    assert "/checkpoints/4" in line and "File too large" in line
    assert "; raise the limit on the size of a file (ulimit -f) and re" in line
    assert line.endswith("and rerun the command to resume")
    places = (tmp_path / "run" / "checkpoints").iterdir()
    assert {p.name for p in places if p.name.isdigit()} == {"2"}
    topd(*train)
    assert_same_run(trained, tmp_path / "run")


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
