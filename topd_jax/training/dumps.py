"""Dumps: a step that raised an alarm, with what it can be repeated from.

``WORKDIR/dumps/STEP-NAME/`` holds ``dump.json`` (step, alarm, metrics), the
``settings.json`` of the run, ``batch.npz`` (the rows of the step) and the
checkpoint before it. Steps are deterministic, so ``topd replay`` needs no
more.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from topd_jax.models.io import runs
from topd_jax.objectives.pieces import describe
from topd_jax.parallel import buckets, hosts
from topd_jax.training.watch import Alarm

DUMPS, ABOUT, BATCH = "dumps", "dump.json", "batch.npz"


def write_dump(run: Any, alarm: Alarm) -> pathlib.Path:
    """Write a step down; the newest of a name and ``guard.dumps`` in all stay.

    Args:
      run: whose newest checkpoint is older than the step.
      alarm: of one of its last two steps.

    Returns:
      The directory; it exists whole or not at all.
    """
    folder = run.workdir / DUMPS
    path = folder / f"{alarm.step}-{alarm.name}"
    batch = hosts.on_host(arrays_of(run.batches[alarm.step]))
    run.checkpoints.wait()
    if not hosts.is_first():
        return path
    checkpoint, settings = run.checkpoints.latest(), run.settings.to_dict()
    # Wherever the dump is read, the models are here.
    cache = run.settings.world.cache or run.workdir / "world"
    settings["world"]["cache"] = str(cache)
    about = {
        "step": alarm.step,
        "alarm": alarm.name,
        "text": alarm.text,
        "metrics": dict(alarm.metrics),
        "checkpoint": checkpoint,
        "restart": run.restart,
        "objective": describe(run.objective),
        "devices": run.setup.mesh.size,
    }
    with _whole(path) as fresh:
        (fresh / runs.SETTINGS).write_text(json.dumps(settings, indent=1))
        np.savez(fresh / BATCH, **batch)
        (fresh / ABOUT).write_text(json.dumps(about, indent=1))
        saved = pathlib.Path(runs.LATEST, str(checkpoint))
        if checkpoint is not None and buckets.is_remote(path):
            buckets.copy_within(run.workdir / saved, path / saved)
        elif checkpoint is not None:
            shutil.copytree(
                run.workdir / saved, fresh / saved, copy_function=_link
            )
    # After a roll-back others may be of later steps.
    by_age = sorted(folder.glob("*-*"), key=lambda p: (p == path, _age(p)))
    for old in by_age[: -run.settings.guard.dumps]:
        buckets.remove(old)
    return path


def arrays_of(rows: Any) -> dict[str, Any]:
    """Return the arrays of a batch by name, "teacher_prompt.mask" too."""
    leaves = jax.tree_util.tree_leaves_with_path(rows)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {keystr(path): x for path, x in leaves}


@contextlib.contextmanager
def _whole(path: Any) -> Iterator[pathlib.Path]:
    """Write a dump in the place of older ones of its name."""
    name = path.name.partition("-")[2]
    if buckets.is_remote(path):
        buckets.remove(path)
        with buckets.uploaded(path, last=ABOUT) as fresh:
            yield fresh
        for old in path.parent.glob(f"*-{name}"):
            if old != path:
                buckets.remove(old)
        return
    fresh = path.parent / "unfinished"
    buckets.remove(fresh)
    fresh.mkdir(parents=True)
    yield fresh
    for old in (*path.parent.glob(f"*-{name}"), path):
        buckets.remove(old)
    fresh.rename(path)


def _age(path: Any) -> int:
    """Return what is higher for a later dump."""
    if buckets.is_remote(path):  # a folder there has no time
        return int(path.name.partition("-")[0])
    return path.stat().st_mtime_ns


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_dump(path: pathlib.Path) -> dict[str, Any]:
    """Read what a dump tells of itself.

    Args:
      path: the directory.

    Returns:
      What ``dump.json`` holds; "settings" and "batch" (name -> array) beside.

    Raises:
      ValueError: where it is no dump.
    """
    if not (path / ABOUT).is_file():
        raise ValueError(
            f"{path} is no dump; a run writes them to WORKDIR/{DUMPS}"
        )
    about, settings = (
        json.loads((path / name).read_bytes())
        for name in (ABOUT, runs.SETTINGS)
    )
    with (path / BATCH).open("rb") as file, np.load(file) as batch:
        return about | {"batch": dict(batch), "settings": settings}
