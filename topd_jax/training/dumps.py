"""Dumps: a step that raised an alarm, with what it can be repeated from.

``WORKDIR/dumps/STEP-NAME/`` holds ``dump.json`` (step, alarm, metrics), the
``settings.json`` of the run, ``batch.npz`` (the rows of the step) and the
checkpoint before it. Steps are deterministic, so ``topd replay`` needs no
more.
"""

import json
import os
import pathlib
import shutil
import zipfile
import zlib
from typing import Any

import numpy as np

from topd_jax.models.io import runs
from topd_jax.objectives.pieces import describe
from topd_jax.parallel import hosts
from topd_jax.settings import parse_json
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
    batch = hosts.on_host(vars(run.batches[alarm.step]))
    run.checkpoints.wait()
    if not hosts.is_first():
        return path
    fresh = folder / "unfinished"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    settings = run.settings.to_dict()
    # Wherever the dump is read, the models are here.
    cache = run.settings.world.cache or run.workdir / "world"
    settings["world"]["cache"] = str(cache)
    (fresh / runs.SETTINGS).write_text(json.dumps(settings, indent=1))
    np.savez(fresh / BATCH, **batch)
    checkpoint = run.checkpoints.latest()
    about = {
        "step": alarm.step,
        "alarm": alarm.name,
        "text": alarm.text,
        "metrics": dict(alarm.metrics),
        "checkpoint": checkpoint,
        "restart": run.restart,
        "objective": describe(run.objective),
    }
    (fresh / ABOUT).write_text(json.dumps(about, indent=1))
    if checkpoint is not None:
        saved = pathlib.Path(runs.LATEST, str(checkpoint))
        shutil.copytree(run.workdir / saved, fresh / saved, copy_function=_link)
    for old in (*folder.glob(f"*-{alarm.name}"), path):
        shutil.rmtree(old, ignore_errors=True)
    fresh.rename(path)
    by_age = sorted(folder.glob("*-*/"), key=lambda p: p.stat().st_mtime_ns)
    for old in by_age[: -run.settings.guard.dumps]:
        shutil.rmtree(old)
    return path


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
      ValueError: where it is no dump, or a file of it is damaged.
    """
    if not (path / ABOUT).is_file():
        raise ValueError(
            f"{path} is no dump; a run writes them to WORKDIR/{DUMPS}"
        )
    names = (ABOUT, runs.SETTINGS)
    about, settings = (
        parse_json((path / n).read_bytes(), str(path / n)) for n in names
    )
    try:
        with np.load(path / BATCH) as batch:
            arrays = dict(batch)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path / BATCH} is damaged ({error}); let the run write it again"
        ) from error
    return about | {"batch": arrays, "settings": settings}
