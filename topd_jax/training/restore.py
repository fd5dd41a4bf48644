"""Restore a run's student for inference."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from topd_jax.models.io import checksums, runs
from topd_jax.models.lora import join, split
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.pieces import describe
from topd_jax.parallel import buckets, hosts
from topd_jax.training import checkpointing, identity
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup, load_setup

_FOLDERS = {"latest": runs.LATEST, "best": runs.BEST, "start": ""}
# Of a damaged checkpoint.
_WAYS_OUT = {
    "latest": "resume the run, which goes back to an older one and repeats "
    "its steps, or say --which best",
    "best": "say --which latest",
}
# What may differ between a run and one that reads its student: how that is
# used, and of the start what changes it later.
_USE = ("data", "rollout", "eval", "mesh")
_FREE = {
    "latest": _USE,
    "best": _USE,
    "start": (*_USE, "seed", "objective", "optimizer", "offline", "train"),
}


def require_checkpoint(workdir: pathlib.Path, which: str) -> None:
    """Refuse a run without a checkpoint, before any model is made.

    Args:
      workdir: of the run.
      which: "latest", "best" or "start"; the start needs none.

    Raises:
      ValueError: naming the directory and the ways out.
    """
    where = workdir / _FOLDERS[which]
    if which == "start" or runs.steps(where):
        return
    # A run that never evaluates keeps no best.
    trained = which == "best" and runs.steps(workdir / runs.LATEST)
    way_out = "say --which latest" if trained else (
        "train first, or say --which start"
    )  # fmt: skip
    raise ValueError(f"no checkpoint in {where}; {way_out}")


def require_same_settings(
    settings: Settings, workdir: pathlib.Path, which: str = ""
) -> None:
    """Refuse the work directory of another run, before any model is made.

    Args:
      settings: of the run.
      workdir: of the run; one without a checkpoint is anybody's, and whose a
        damaged one is shows when it is loaded.
      which: the student to read, "latest", "best" or "start", for which some
        settings may differ; "" to train on.

    Raises:
      ValueError: naming every setting that differs.
    """
    where = workdir / (_FOLDERS.get(which) or runs.LATEST)
    if runs.steps(where):
        _, saved = _newest(where, settings)
        if saved is not None:
            identity.require_same_settings(
                saved,
                settings,
                # An objective given in Python is known to its run alone.
                saved["objective"]
                if saved["settings"]["objective"] == settings.objective
                else describe(make_objective(settings.objective)),
                str(where),
                free=_FREE.get(which, ()),
            )


def _newest(
    where: pathlib.Path, settings: Settings
) -> tuple[int, dict[str, Any] | None]:
    """Return step and record of the newest checkpoint; None: it is damaged."""
    checkpoints = checkpointing.Checkpoints(where, settings.checkpoint.keep)
    step, saved = checkpoints.latest(), None
    if not checksums.find_damage(where / str(step), [checksums.RECORD]):
        saved = checkpoints.record(step)
    checkpoints.close()
    return step, saved


@contextlib.contextmanager
def open_run(
    settings: Settings, workdir: pathlib.Path, which: str
) -> Iterator[tuple[Setup, Any, int]]:
    """Load a run and the student of one of its checkpoints, on its mesh.

    Args:
      settings: of the run.
      workdir: of the run.
      which: "latest", "best" or "start".

    Yields:
      (setup, student, step of the checkpoint).

    Raises:
      ValueError: where there is no checkpoint, or it is another run's, before
        models are loaded.
    """
    require_checkpoint(workdir, which)
    require_same_settings(settings, workdir, which)
    setup = load_setup(settings, workdir)
    with jax.set_mesh(setup.mesh):
        yield setup, *load_student(settings, workdir, setup, which)


def load_student(
    settings: Settings, workdir: pathlib.Path, setup: Setup, which: str
) -> tuple[Any, int]:
    """Load the student of a run's checkpoint, and not its optimizer.

    Args:
      settings: of the run, which are known to be those of the checkpoint.
      workdir: of the run, which has the checkpoint.
      setup: of the run; its student is the start.
      which: "latest", "best" or "start".

    Returns:
      (student, step it was saved at; 0 for the start).

    Raises:
      ValueError: where it is damaged, or was made with other models.
    """
    if which == "start":
        return setup.student, 0
    where = workdir / _FOLDERS[which]
    step, saved = _newest(where, settings)
    hosts.from_first(
        lambda: checksums.require_intact(where / str(step), _WAYS_OUT[which])
    )
    identity.require_same_models(
        saved,
        setup.teacher_fingerprints,
        setup.frozen_fingerprint,
        str(where),
    )
    trained, frozen = split(setup.student)
    trained = restore_student(where, step, trained)
    return join(trained, frozen), step


def restore_student(directory: pathlib.Path, step: int, student: Any) -> Any:
    """Read the trained part of a student, and nothing of the optimizer.

    Args:
      directory: of the checkpoints.
      step: which one.
      student: of the right shapes, dtypes and shardings.

    Returns:
      The same pytree, restored.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, student)
    # As plain dictionaries: a module has nodes that hold no array.
    plain = ocp.tree.serialize_tree(target, keep_empty_nodes=False)
    item = {"train": {"student": plain}}
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.restore(
            buckets.absolute(directory / str(step) / "state"),
            args=ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )["train"]["student"]
    return ocp.tree.deserialize_tree(saved, target, keep_empty_nodes=False)
