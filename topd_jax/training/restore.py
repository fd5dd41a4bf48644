"""The student of a run's checkpoint, for what reads it and trains nothing."""

import pathlib
from typing import Any

from topd_jax.models.io import runs
from topd_jax.models.lora import join, split
from topd_jax.training import checkpointing
from topd_jax.training.config import Settings
from topd_jax.training.loop import initial_state
from topd_jax.training.phases import make_optimizer
from topd_jax.training.setup import Pair

_FOLDERS = {"latest": runs.LATEST, "best": runs.BEST, "start": ""}


def require_checkpoint(workdir: pathlib.Path, which: str) -> None:
    """Refuses a run without a checkpoint, before any model is made.

    Args:
      workdir: of the run.
      which: "latest", "best" or "start"; the start needs none.

    Raises:
      ValueError: naming the directory and the ways out.
    """
    where = workdir / _FOLDERS[which]
    if which != "start" and not checkpointing.has_steps(where):
        raise ValueError(
            f"no checkpoint in {where}; train first, or say --which start"
        )


def load_student(
    settings: Settings, workdir: pathlib.Path, pair: Pair, which: str
) -> tuple[Any, int]:
    """The student of a run's checkpoint.

    Args:
      settings: of the run; how it reads, writes and evaluates may differ.
      workdir: of the run.
      pair: of the run; its student is the start.
      which: "latest", "best" or "start".

    Returns:
      (student, step it was saved at; 0 for the start).

    Raises:
      ValueError: where there is no checkpoint, or it is another run's.
    """
    require_checkpoint(workdir, which)
    if which == "start":
        return pair.student, 0
    where = workdir / _FOLDERS[which]
    saved = checkpointing.Checkpoints(where, settings.checkpoint.keep)
    step = saved.latest()
    checkpointing.require_same_run(
        saved.record(step),
        settings,
        pair.teacher_fingerprint,
        str(where),
        frozen=pair.frozen_fingerprint,
        free=("data", "rollout", "eval", "mesh"),
    )
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    state = initial_state(pair, optimizer)
    trained = saved.restore(step, state)[0].student
    return join(trained, split(pair.student)[1]), step
