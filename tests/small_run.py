"""A whole run in seconds: the tiny world with barely trained models."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from topd_jax.cli.refusals import is_refusal
from topd_jax.configs import tiny
from topd_jax.objectives.loading import spell
from topd_jax.parallel import buckets
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.logging import read_jsonl

# Options that make every look ahead small.
SMALL = {"candidates": 2, "window": 4}
OBJECTIVE = spell("topd", **SMALL, guidance_weight=0.3)


def small_config() -> ConfigDict:
    """The tiny config, cut down until a run takes seconds."""
    config = tiny.get_config()
    config.student.unroll = config.teacher.unroll = 1
    world = config.world
    world.solutions = 400
    world.prompts = 64
    world.teacher_layers = world.student_layers = 1
    world.teacher_width = world.student_width = 32
    world.teacher_heads = world.student_heads = 2
    world.teacher_steps = world.student_steps = 3
    world.batch_size = 16
    config.data.batch_size = 8
    config.rollout.max_new_tokens = 16
    config.objective = OBJECTIVE
    config.train.steps = 6
    config.train.preflight = False  # tests of its own; seconds a run
    config.log.statistics_every = 3
    config.log.completions_every = 3
    config.log.tensorboard = False
    config.eval.every = 4
    config.eval.problems = config.eval.final_problems = 8
    config.eval.batch_size = 8
    config.checkpoint.every = 2
    return config


def settings_with(cache: Path | None = None, **changes: object) -> Settings:
    """The small settings; changes as section__name=value."""
    config = small_config()
    if cache is not None:
        config.world.cache = str(cache)
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return settings_from(config)


def changed(settings: Settings, section: str, **fields: object) -> Settings:
    """The settings with other values in one section."""
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


class Refusal(str):
    """One line of the command line's."""


def attempt(call: Callable[[], object]) -> object:
    """What it returns, or the line that refuses what the user gave."""
    try:
        return call()
    except Exception as error:
        if not is_refusal(error):
            raise
        return Refusal(" ".join(str(error).split()))


def refusal_of(call: Callable[[], object]) -> str:
    """The line that refuses what the user gave."""
    line = attempt(call)
    assert isinstance(line, Refusal), line
    return line


def run_in(settings: Settings, workdir: Path, setup: object) -> object:
    """A run that leaves the setup as it was."""
    from topd_jax.training import loop

    return loop.Run(settings, workdir, dataclasses.replace(setup))


@contextlib.contextmanager
def interrupted(step: int):
    """What trains within is stopped before a step."""
    from topd_jax.training import loop

    plain = loop.Run._one_step

    def stopping(self: loop.Run, at: int) -> object:
        if at == step:
            # Unlike a process that is killed, this one would write on.
            self.checkpoints.wait()
            self.best.wait()
            raise KeyboardInterrupt
        return plain(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_one_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def without_times(path: Path) -> list[dict]:
    """The lines of a log, but for what differs from run to run."""
    times = ("seconds", "rate")
    return [
        {k: v for k, v in row.items() if not k.startswith(times)}
        for row in read_jsonl(path)
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Both runs ended with the same bits, and logged the same numbers."""
    (one, last), (other, step) = map(saved_arrays, (a, b))
    assert last == step
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    for name in ("metrics", "evals", "completions", "problems"):
        logged = without_times(a / f"{name}.jsonl")
        assert logged == without_times(b / f"{name}.jsonl")
        assert logged or name == "completions"


def saved_arrays(
    workdir: Path, folder: str = "checkpoints"
) -> tuple[dict[str, np.ndarray], int]:
    """All that the latest checkpoint holds by its path, and its step."""
    steps = (workdir / folder).iterdir()
    step = max(int(p.name) for p in steps if p.name.isdigit())
    state = buckets.absolute(workdir / folder / str(step) / "state")
    with ocp.PyTreeCheckpointer() as reader:
        # Wherever they were: a run may have had more devices.
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(state).item_metadata.tree,
        )
        saved = reader.restore(state, restore_args=plain)
    leaves = jax.tree_util.tree_leaves_with_path(saved)
    names = jax.tree_util.keystr
    return {names(path): np.asarray(leaf) for path, leaf in leaves}, step


def get_config() -> ConfigDict:
    """So that this file serves as --config."""
    return small_config()
