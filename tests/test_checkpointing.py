"""Checkpoints: what is kept, what a kill leaves, what may be resumed."""

import asyncio
import dataclasses
import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.path import atomicity
from small_files import LLAMA
from small_run import changed, settings_with
from small_step import assert_trees_equal

from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.pieces import describe
from topd_jax.training import checkpointing, identity
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.identity import (
    require_same_models,
    require_same_settings,
)

SETTINGS = settings_with()
OBJECTIVE = describe(make_objective(SETTINGS.objective))
TEACHERS = {"": "t" * 64}


def state(value: float) -> dict:
    return {
        "weights": jnp.full((3, 2), value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def record(**changes) -> dict:
    """A record as it comes back: through JSON."""
    arguments = dict(
        settings=SETTINGS, objective=OBJECTIVE, teachers=TEACHERS,
        position={"next_index": 3}, student=LLAMA,
    )  # fmt: skip
    made = identity.record(**(arguments | changes))
    return json.loads(json.dumps(made))


def save(checkpoints, step, value=None, key=None):
    key = jax.random.key(7) if key is None else key
    value = step if value is None else value
    checkpoints.save(step, state(value), key, record())


def test_the_latest_are_kept_and_come_back(tmp_path):
    key = jax.random.key(7, impl="unsafe_rbg")
    saved = Checkpoints(tmp_path / "new", 2)
    assert saved.latest() is None
    for step in (1, 2, 4):
        save(saved, step, key=key)
    for step in (2, 4):  # what is there already is left
        save(saved, step, value=9)
    saved.close()
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"2", "4"}
    again = Checkpoints(tmp_path / "new", 2)
    assert again.latest() == 4
    assert_trees_equal(again.restore(2, state(0))[0], state(2))
    restored, restored_key = again.restore(4, state(0))
    assert_trees_equal(restored, state(4))
    assert jax.random.key_impl(restored_key) == jax.random.key_impl(key)
    assert jax.random.normal(restored_key) == jax.random.normal(key)
    assert again.record(4)["data"] == {"next_index": 3}
    old = record()
    del old["format"]
    again.save(5, state(5), key, old)
    again.wait()
    with pytest.raises(ValueError, match=r"5 has format 1 .* reads format 4"):
        again.record(5)


def test_a_checkpoint_that_is_being_written_is_dropped_whole(
    tmp_path, monkeypatch
):
    """As by a roll-back soon after an evaluation that was the best."""
    write = checkpointing.checksums.write_checksums

    def slow(place):
        time.sleep(0.3)
        write(place)

    monkeypatch.setattr(checkpointing.checksums, "write_checksums", slow)
    saved = Checkpoints(tmp_path, 1)
    save(saved, 6)
    saved.drop_after(5)
    saved.wait()
    assert saved.latest() is None and not list(tmp_path.iterdir())
    save(saved, 6, value=7)
    saved.wait()
    assert_trees_equal(saved.restore(6, state(0))[0], state(7))


def test_a_kill_during_the_background_write_leaves_the_one_before(
    tmp_path, monkeypatch
):
    """And the step may donate the state as soon as save returns."""
    saved = Checkpoints(tmp_path / "run", 2)
    save(saved, 2)
    saved.wait()
    release = threading.Event()
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def held(self, *arguments, **options):
        await asyncio.to_thread(release.wait, 60)
        return await finalize(self, *arguments, **options)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", held)
    donated = state(4)
    saved.save(4, donated, jax.random.key(7), record())
    jax.tree.map(lambda x: x.delete(), donated)
    # What is on the disk now is what a kill would leave.
    # A lock may go while it is copied.
    some = shutil.ignore_patterns("*__lock")
    shutil.copytree(tmp_path / "run", tmp_path / "killed", ignore=some)
    release.set()
    saved.close()
    monkeypatch.undo()
    killed = Checkpoints(tmp_path / "killed", 2)
    assert killed.latest() == 2
    assert_trees_equal(killed.restore(2, state(0))[0], state(2))
    save(killed, 4)
    killed.close()
    for folder in ("run", "killed"):
        found = Checkpoints(tmp_path / folder, 2)
        assert_trees_equal(found.restore(4, state(0))[0], state(4))


def test_an_error_of_the_background_write_is_raised(tmp_path, monkeypatch):
    """By the next save, naming the place; nothing is committed."""

    def full(*_):
        raise OSError(28, "No space left on device")

    saved = Checkpoints(tmp_path, 2)
    monkeypatch.setattr(checkpointing.checksums, "write_checksums", full)
    save(saved, 2)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}"):
        save(saved, 4)
    assert Checkpoints(tmp_path, 2).newest_intact() is None


def test_a_save_that_hangs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_SAVE_SECONDS", 0)
    answers = threading.Event()
    monkeypatch.setattr(
        checkpointing.checksums, "write_checksums", lambda _: answers.wait()
    )
    saved = Checkpoints(tmp_path, 2)
    save(saved, 1)
    with pytest.raises(TimeoutError, match="See that this storage answers"):
        saved.wait()
    answers.set()
    monkeypatch.undo()
    saved.close()
    assert saved.latest() == 1


def test_a_save_that_fails_at_once_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_SAVE_SECONDS", 0)
    saved = Checkpoints(tmp_path / "run", 2)
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        save(saved, 1)
    saved.wait()


def test_a_model_of_another_config_has_no_shape_that_others_could_load():
    assert record()["student"] == json.loads(json.dumps(LLAMA.to_dict()))
    for other in (None, {"width": 8}, SETTINGS.optimizer, SETTINGS):
        assert "student" not in record(student=other)


# --- what must agree ------------------------------------------------------


def check(settings=SETTINGS, saved=None, objective=OBJECTIVE, free=()):
    saved = record() if saved is None else saved
    return require_same_settings(
        saved, settings, objective, "runs/a", free=free
    )


def test_what_changes_no_number_may_differ():
    settings = SETTINGS
    for section, fields in {
        "log": {"top_k": 7, "tensorboard": True}, "checkpoint": {"keep": 9},
        "guard": {"window": 9, "rollbacks": 3}, "sweep": {"seeds": (1, 2)},
        "world": {"cache": "elsewhere"},
        "eval": {"samples": 16, "benchmarks": ("aime24.jsonl",)},
    }.items():  # fmt: skip
        settings = changed(settings, section, **fields)
    # Another spelling of the same objective.
    text = "topd(window=4, candidates=2, guidance_weight=0.3, percentile=30.0)"
    settings = dataclasses.replace(settings, objective=text)
    assert check(settings) == []
    settings = changed(settings, "eval", problems=3)
    assert check(settings, free=("eval",)) == []


def test_the_ways_out_of_an_unstable_run_may_change_and_are_told():
    settings = SETTINGS
    for section, key in (name.split(".") for name in identity.MAY_CHANGE):
        value = "gathered" if key.endswith("sharding") else 2
        settings = changed(settings, section, **{key: value})
    floor = SETTINGS.objective[:-1] + ", log_floor=-50.0)"
    told = check(settings, objective=describe(make_objective(floor)))
    names = (*identity.MAY_CHANGE, "objective.token_loss.log_floor")
    assert sorted(line.partition(": ")[0] for line in told) == sorted(names)


def test_every_difference_is_named_with_both_values():
    settings = changed(SETTINGS, "optimizer", beta1=0.5)
    settings = dataclasses.replace(settings, seed=3)
    other = describe(make_objective(SETTINGS.objective.replace("0.3", "0.4")))
    # What one version lacks is at its default there.
    saved = record()
    del saved["settings"]["optimizer"]["beta1"]
    saved["settings"]["optimizer"]["momentum"] = 0.5
    with pytest.raises(ValueError) as error:
        check(settings, saved, other)
    text = str(error.value)
    for part in (
        "runs/a", "optimizer.beta1: 0.9 there, 0.5 here",
        "seed: 0 there, 3 here", "use another --workdir",
        "weight: 0.3 there, 0.4 here", "momentum: 0.5 there, None here",
    ):  # fmt: skip
        assert part in text
    assert "world" not in text and "beta2" not in text


def test_other_teachers_and_another_base_are_differences():
    def check(teachers=TEACHERS, frozen="f" * 64):
        saved = record(frozen="f" * 64)
        require_same_models(saved, teachers, frozen, "runs/a")

    check()
    with pytest.raises(ValueError, match="another teacher .*t{64}.*u{64}"):
        check(teachers={"": "u" * 64})
    with pytest.raises(ValueError, match="another teacher 'b' .fing.* None th"):
        check(teachers=TEACHERS | {"b": "u" * 64})
    for frozen, said in (("g" * 64, "g{64}"), ("", "none")):
        with pytest.raises(ValueError, match=f"another model.*f{{64}}.*{said}"):
            check(frozen=frozen)
