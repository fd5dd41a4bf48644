"""Storage that lies: damaged checkpoints and logs, and what becomes of runs."""

import pathlib
import shutil
import subprocess

import jax
import pytest
from small_run import saved_arrays, settings_with, without_times
from small_step import assert_trees_equal
from test_checkpointing import record, state

from topd_jax.models import load
from topd_jax.models.io import checksums
from topd_jax.training import loop
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.logging import read_jsonl

SUMS = "SHA256SUMS"


def save(directory, *steps):
    checkpoints = Checkpoints(directory, 3)
    for step in steps:
        told = record(position={"next_index": step})
        checkpoints.save(step, state(step), jax.random.key(step), told)
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints; read only."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 2, 4, 6)
    return directory


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGES = flip, truncate, empty, pathlib.Path.unlink
UNUSED = "_CHECKPOINT_METADATA", "commit_success.txt"


def test_every_file_is_verified_or_unused(saved, tmp_path):
    place = tmp_path / "6"
    shutil.copytree(saved / "6", place)
    assert len(files_of(place)) > 10
    for file in files_of(place):
        text, name = file.read_bytes(), str(file.relative_to(place))
        for damage in DAMAGES:
            damage(file)
            fault = checksums.find_damage(place)
            if name in UNUSED:
                assert fault is None
            else:
                # A changed list accuses the file that it no longer describes.
                assert fault and (name in fault or name == SUMS), name
            file.write_bytes(text)
    assert checksums.find_damage(place) is None
    checkpoints = Checkpoints(tmp_path, 3)
    for damage in DAMAGES:  # the last one removes it
        for name in UNUSED:
            damage(place / name)
        assert checkpoints.newest_intact() == 6
        restored, key = checkpoints.restore(6, state(0))
        assert_trees_equal(restored, state(6))
        assert jax.random.key_data(key).tolist() == [0, 6]
        assert checkpoints.record(6)["data"] == {"next_index": 6}
    checkpoints.close()


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_coreutils_read_the_checksums(saved):
    line = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(line, cwd=saved / "6").returncode == 0


def test_damaged_checkpoints_are_named_and_moved_only_if_one_is_intact(
    saved, tmp_path, caplog
):
    shutil.copytree(saved, tmp_path / "run")
    for step in ("4", "6"):
        empty(tmp_path / "run" / step / "record" / "metadata")
    assert Checkpoints(tmp_path / "run", 3).newest_intact() == 2
    for step in (4, 6):
        said = f"{tmp_path}/run/{step} is damaged: record/metadata differs"
        assert said in caplog.text
        assert f"moved to {tmp_path}/run/damaged-{step}" in caplog.text
    save(tmp_path / "run", 4, 6)
    empty(tmp_path / "run" / "6" / SUMS)
    assert Checkpoints(tmp_path / "run", 3).newest_intact() == 4
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"2", "4", "damaged-4", "damaged-6"}
    for file in files_of(tmp_path / "run" / "4"):
        file.unlink()
    shutil.rmtree(tmp_path / "run" / "2" / "state")
    checkpoints = Checkpoints(tmp_path / "run", 3)
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .*/run is intact \(4: SHA256SUMS is missing; "
        r"2: state/_.* is missing\); put one back .* or remove the directory",
    ):
        checkpoints.newest_intact()
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    assert checkpoints.newest_intact(required=False) is None


# --- runs, and who reads them ---------------------------------------------


def data_file(checkpoint):
    """The largest file: arrays."""
    return max(files_of(checkpoint), key=lambda p: p.stat().st_size)


def test_a_run_repeats_the_steps_of_a_damaged_checkpoint(
    trained, world_cache, tmp_path, caplog
):
    """Also without its logs, or with garbage in them."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    flip(data_file(run / "checkpoints" / "6"))
    flip(data_file(next((run / "best").iterdir())))
    for name in ("evals", "problems", "completions"):
        (run / f"{name}.jsonl").unlink()
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b"\xff\x00\n[]\n")
    final = loop.train(settings_with(world_cache), run)
    assert caplog.text.count(" is damaged: state/") == 2
    assert f"{run}/metrics.jsonl: dropped 2 damaged line(s)" in caplog.text
    assert final == read_jsonl(trained / "evals.jsonl")[-1]
    kept, before = (without_times(x / "metrics.jsonl") for x in (run, trained))
    assert kept == before
    assert_trees_equal(saved_arrays(run), saved_arrays(trained))
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "4", "6", "damaged-6"
    }  # fmt: skip


def test_readers_refuse_a_damaged_checkpoint(
    trained, tmp_path, small_arguments, refused
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    flip(data_file(run / "checkpoints" / "6"))
    line = refused("eval", *small_arguments, f"--workdir={run}")
    assert f"checkpoint {run}/checkpoints/6 is damaged: state/" in line
    assert "resume the run" in line and line.endswith("or say --which best")
    (best,) = (run / "best").iterdir()
    flip(data_file(best))
    line = refused("eval", *small_arguments, f"--workdir={run}", "--which=best")
    assert f"{best} is damaged" in line and line.endswith("say --which latest")
    with pytest.raises(ValueError, match=r"6 is damaged: state/.* resume its"):
        load(run)
    flip(run / "checkpoints" / "6" / "record" / "metadata")
    with pytest.raises(ValueError, match=r"6 is damaged: record/metadata dif"):
        load(run)
    assert not list(run.glob("*/damaged*")), "a reader moves nothing"
