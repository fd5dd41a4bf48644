"""Checkpoints and cut logs, apart from the runs of test_train.py."""

import dataclasses
import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_files import LLAMA
from small_run import small_config

from topd_jax.training import checkpointing
from topd_jax.training.checkpointing import (
    Checkpoints,
    cut_log,
    require_same_run,
)
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl

SETTINGS = settings_from(small_config())
RECORD = {"data": {"next_index": 3}}


def state(value: float) -> dict:
    return {
        "weights": jnp.full((3, 2), value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def save(checkpoints, step, value=None):
    checkpoints.save(
        step, state(step if value is None else value), jax.random.key(7), RECORD
    )


def test_what_is_saved_comes_back(tmp_path):
    save(Checkpoints(tmp_path / "new", 2), 4)
    again = Checkpoints(tmp_path / "new", 2)
    assert again.latest() == 4
    found, key = again.restore(4, state(0))
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
        lambda x: x.dtype, state(0)
    )
    np.testing.assert_array_equal(found["weights"], state(4)["weights"])
    assert found["step"] == 4
    np.testing.assert_array_equal(
        jax.random.key_data(key), jax.random.key_data(jax.random.key(7))
    )
    assert again.record(4) == RECORD


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "a" / "b", 2).latest() is None


def test_only_the_latest_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        save(saved, step)
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3"}


def test_a_repeated_step_is_left_as_it_was(tmp_path):
    saved = Checkpoints(tmp_path, 2)
    save(saved, 2)
    save(saved, 4)
    for step in (2, 4):
        save(saved, step, value=9)
        assert saved.latest() == 4
        assert saved.restore(step, state(0))[0]["step"] == step


def test_one_that_was_not_finished_does_not_count(tmp_path):
    saved = Checkpoints(tmp_path, 2)
    save(saved, 2)
    saved.close()
    torn = tmp_path / "4.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "state").write_text("half")
    again = Checkpoints(tmp_path, 2)
    assert again.latest() == 2
    save(again, 4)
    assert again.restore(4, state(0))[0]["step"] == 4


def changed(section: str, **fields: object):
    part = dataclasses.replace(getattr(SETTINGS, section), **fields)
    return dataclasses.replace(SETTINGS, **{section: part})


def written() -> dict:
    """A record as it comes back: through JSON."""
    found = checkpointing.record(SETTINGS, "t" * 64, RECORD, LLAMA)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        changed("log", every=7, tensorboard=True),
        changed("checkpoint", keep=9),
        changed("sweep", seeds=(1, 2)),
        changed("world", cache="elsewhere"),
        changed("eval", samples=16, benchmarks=("aime24.jsonl",)),
    ],
)
def test_what_changes_nothing_may_differ(settings):
    require_same_run(written(), settings, "t" * 64, "there")


def test_every_difference_is_named_with_both_values():
    settings = changed("optimizer", clip=2.0)
    settings = dataclasses.replace(settings, seed=3)
    with pytest.raises(ValueError) as error:
        require_same_run(written(), settings, "t" * 64, "runs/a/checkpoints")
    text = str(error.value)
    assert "runs/a/checkpoints" in text
    assert "optimizer.clip: 1.0 there, 2.0 here" in text
    assert "seed: 0 there, 3 here" in text
    assert "world" not in text
    assert "use another --workdir" in text


def test_a_key_that_came_was_at_its_default_and_one_that_went_differs():
    found = written()
    del found["settings"]["optimizer"]["clip"]
    require_same_run(found, SETTINGS, "t" * 64, "there")
    found["settings"]["optimizer"]["momentum"] = 0.5
    with pytest.raises(ValueError) as error:
        require_same_run(
            found, changed("optimizer", clip=2.0), "t" * 64, "there"
        )
    assert "optimizer.clip: 1.0 there, 2.0 here" in str(error.value)
    assert "optimizer.momentum: 0.5 there, None here" in str(error.value)


def test_a_section_may_be_freed_for_readers():
    settings = changed("eval", problems=3)
    with pytest.raises(ValueError, match=r"eval\.problems: 8 there, 3 here"):
        require_same_run(written(), settings, "t" * 64, "there")
    require_same_run(written(), settings, "t" * 64, "there", free=("eval",))


def test_another_teacher_is_a_difference():
    with pytest.raises(ValueError, match="another teacher .*t{64}.*u{64}"):
        require_same_run(written(), SETTINGS, "u" * 64, "there")


def test_adapters_of_another_model_are_a_difference():
    found = checkpointing.record(
        SETTINGS, "t" * 64, RECORD, LLAMA, frozen="f" * 64
    )
    require_same_run(found, SETTINGS, "t" * 64, "there", frozen="f" * 64)
    with pytest.raises(ValueError, match="of another model.*f{64}.*g{64}"):
        require_same_run(found, SETTINGS, "t" * 64, "there", frozen="g" * 64)
    with pytest.raises(ValueError, match="f{64} there, none here"):
        require_same_run(found, SETTINGS, "t" * 64, "there")
    del found["frozen"]  # of a run before there were adapters
    require_same_run(found, SETTINGS, "t" * 64, "there")


def test_cutting_a_log_that_does_not_exist_makes_none(tmp_path):
    cut_log(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_fresh_run_keeps_nothing_of_a_log(tmp_path):
    path = tmp_path / "evals.jsonl"
    path.write_text('{"step": 0}\n{"step": 4}\n')
    cut_log(path, -1)
    assert path.read_text() == ""


def test_a_full_disk_leaves_the_log_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self: Path, text: str, **_: object) -> None:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        cut_log(path, 1)
    monkeypatch.undo()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    cut_log(path, 1)
    assert read_jsonl(path) == [{"step": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"record\.jsonl line 3 is not JSON"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []
