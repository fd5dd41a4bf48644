"""A student read from its run, and nothing of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import saved_arrays
from small_step import assert_trees_equal

from topd_jax.cli import main
from topd_jax.training import loop, restore
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.logging import read_jsonl
from topd_jax.training.restore import restore_student


def test_only_the_students_arrays_are_read(trained, settings, setup, asked):
    student, step = restore.load_student(settings, trained, setup, "latest")
    assert step == 6
    assert len(asked) == len(setup.student.arrays)
    assert all(name.startswith("train.student") for name in asked)
    saved = saved_arrays(trained)[0]
    for name, array in student.arrays.items():
        (expected,) = (
            x for n, x in saved.items()
            if "'student'" in n and f"'{name}'" in n
        )  # fmt: skip
        np.testing.assert_array_equal(array, expected)
        assert (np.asarray(array) != setup.student.arrays[name]).any()
    # A student and two moments: nothing has the shape of the teacher's.
    size = sum(x.nbytes for x in setup.student.arrays.values())
    assert sum(x.nbytes for x in saved.values()) < 3 * size + 100


def test_the_best_and_the_start(trained, settings, setup, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*--which start"):
        restore.require_checkpoint(tmp_path, "best")
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match="in .*best; say --which latest"):
        restore.require_checkpoint(tmp_path, "best")
    _, step = restore.load_student(settings, trained, setup, "best")
    accuracies = {
        r["step"]: r["exact_match"]
        for r in read_jsonl(trained / "evals.jsonl")
        if not r["final"]
    }
    assert accuracies[step] == max(accuracies.values())
    start, zero = restore.load_student(settings, trained, setup, "start")
    assert start is setup.student and zero == 0


def test_another_config_is_refused_before_anything_is_loaded(
    trained, small_arguments, tmp_path, refused, monkeypatch
):
    def forbidden(*_):
        raise AssertionError("loaded")

    for module in (restore, loop):
        monkeypatch.setattr(module, "load_setup", forbidden)
    before = sorted(p.name for p in trained.iterdir())
    run = [*small_arguments, f"--workdir={trained}"]
    other = [*run, "--config.world.student_steps=4"]
    out = f"--output={tmp_path / 'out'}"
    for name, which, *more in (
        ("eval", "latest"), ("sample", "best"), ("inspect", "start"),
        ("probe", "latest"), ("correct", "best"), ("export", "start", out),
    ):  # fmt: skip
        line = refused(name, *other, f"--which={which}", *more)
        assert "world.student_steps: 3 there, 4 here" in line
        assert "use another --workdir" in line
    assert "student_steps: 3 there" in refused("train", *other)
    assert sorted(p.name for p in trained.iterdir()) == before
    for which, *free in (
        ("latest", "rollout.max_new_tokens=8", "eval.problems=3"),
        # The start of a run is that of its siblings too.
        ("start", "objective=opd", "seed=1"),
    ):
        line = [*run, f"--which={which}", *(f"--config.{x}" for x in free)]
        with pytest.raises(AssertionError, match="loaded"):
            main.run(["sample", *line])
    line = refused("sample", *run, "--config.objective=opd", "--which=latest")
    assert "other settings" in line and "objective" in line


def test_parameters_in_any_containers_come_back(tmp_path):
    student = {
        "blocks": [{"w": jnp.arange(3.0)}, {"w": jnp.arange(2.0)}],
        "pair": (jnp.ones((2, 2)), (jnp.int8(3),)),
    }
    state = {"student": student, "opt_state": (jnp.zeros(4), None, [])}
    saved = Checkpoints(tmp_path, 1)
    saved.save(1, state, jax.random.key(0), {})
    saved.close()
    like = jax.tree.map(jnp.zeros_like, student)
    assert_trees_equal(restore_student(tmp_path, 1, like), student)
