"""Students of runs, read from their checkpoints.

A work directory of ``topd train`` holds ``checkpoints/STEP`` and
``best/STEP``. Of a checkpoint, once its files are verified, the student alone
is restored, one parameter at a time, straight into its shards. Its shape
stands in the checkpoint's record, so the model that the run started from is
not needed.
"""

import gc
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, SingleDeviceSharding

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io import checksums
from topd_jax.models.io.weights import Placement, build
from topd_jax.models.parameters import parameter_table
from topd_jax.parallel import buckets, hosts

# Folders of a work directory: "latest" and "best" on the command line.
LATEST, BEST = "checkpoints", "best"
SETTINGS, TOKENIZER = "settings.json", "tokenizer"
# What orbax writes last into a checkpoint in a bucket.
_COMMITTED = "commit_success.txt"


def is_run(source: str | os.PathLike) -> bool:
    """Tell whether a path leads into a work directory of ``topd train``.

    Args:
      source: the directory itself, its ``checkpoints`` or ``best``, or one
        step in these.
    """
    source = buckets.as_path(source)
    if (source / "config.json").is_file():  # a model's directory
        return False
    root, _, _ = _split(source)
    return (root / SETTINGS).is_file() or any(
        steps(root / folder) for folder in (LATEST, BEST)
    )


def tokenizer_directory(source: str | os.PathLike) -> Path:
    """Return where a run (see :func:`is_run`) keeps its tokenizer."""
    return _split(buckets.as_path(source))[0] / TOKENIZER


def run_decoder(
    source: str | os.PathLike, config: DecoderConfig, placement: Placement
) -> Decoder:
    """Load the student of a run.

    Args:
      source: a work directory (its latest checkpoint), its ``best``, or one
        step: ``WORKDIR/checkpoints/STEP``.
      config: the student's shape.
      placement: of the parameters.

    Returns:
      The student.

    Raises:
      ValueError: where there is no such checkpoint, naming those there are,
        or it is damaged, says too little of itself or holds only a part of
        its student.
    """
    folder, step = _find(buckets.as_path(source))
    where, dtype = folder / str(step), config.param_dtype
    _require_intact(where, checksums.STATE)
    state = _item(where, checksums.STATE)
    handler = ocp.PyTreeCheckpointHandler()
    paths = _paths(handler.metadata(state).tree, config, where)

    def parameter(name: str, sharding: NamedSharding | None) -> jax.Array:
        return _restore(handler, state, paths[name], sharding, dtype)

    logging.info("reading the student of %s", where)
    return build(config, parameter, placement)


def run_config(source: str | os.PathLike) -> DecoderConfig:
    """Read the shape of a run's student from its checkpoint's record.

    Args:
      source: as in :func:`run_decoder`.

    Raises:
      ValueError: as there.
    """
    folder, step = _find(buckets.as_path(source))
    where = folder / str(step)
    _require_intact(where, checksums.RECORD)
    record = ocp.JsonCheckpointHandler().restore(_item(where, checksums.RECORD))
    if "student" not in record:
        raise ValueError(
            f"the student of the checkpoint {where} is no decoder of this "
            "package, and its shape is not known; give it from Python, as a "
            "function"
        )
    return DecoderConfig.from_dict(record["student"])


def _require_intact(where: Path, item: str) -> None:
    if hosts.is_first():  # it ends the others
        out = "resume its run, or give another checkpoint: WORKDIR/best"
        checksums.require_intact(where, out, [item])


def _item(where: Path, name: str) -> epath.Path:
    """Return an item's folder in a checkpoint, as orbax takes it.

    Its handlers read it alone: nothing is saved or dropped, and no process
    waits for another, as with a manager.
    """
    return epath.Path(buckets.absolute(where)) / name


def _split(path: Path) -> tuple[Path, str, int | None]:
    """Split into (work directory, folder in it, step if one is named)."""
    step = None
    if path.name.isdigit() and path.parent.name in (LATEST, BEST):
        step, path = int(path.name), path.parent
    if path.name in (LATEST, BEST) and not (path / SETTINGS).is_file():
        return path.parent, path.name, step
    return path, LATEST, step


def steps(folder: Path) -> list[int]:
    """List the complete checkpoints of a folder, the oldest first.

    Args:
      folder: of checkpoints; it may not exist.
    """
    # On a disk, one that is being written has a longer name.
    return sorted(
        int(path.name)
        for path in folder.glob("*")
        if path.name.isdigit()
        and (not buckets.is_remote(path) or (path / _COMMITTED).exists())
    )


def _find(source: Path) -> tuple[Path, int]:
    """Return the folder and step that a source means."""
    root, folder, wanted = _split(source)
    saved = steps(root / folder)
    if saved and wanted in (None, *saved):
        return root / folder, saved[-1] if wanted is None else wanted
    there = [
        f"{root / name} (steps {', '.join(map(str, steps(root / name)))})"
        for name in (LATEST, BEST)
        if steps(root / name)
    ]
    raise ValueError(
        f"no checkpoint at {source}: "
        + (f"there is {' and '.join(there)}" if there else "train first")
    )


def _paths(
    saved: Any, config: DecoderConfig, where: Path
) -> dict[str, tuple[str, ...]]:
    """Map each parameter to its path in the saved train state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(saved["train"]["student"])
    paths, shapes = {}, {}
    for keys, leaf in leaves:
        names = tuple(key.key for key in keys)
        path = names[:-1] if names[-1] == "value" else names  # nnx.Param's
        paths[path[-1]] = ("train", "student", *names)
        shapes[path[-1]] = tuple(leaf.shape)
    table = parameter_table(config)
    absent = [
        name for name, row in table.items() if shapes.get(name) != row.shape
    ]
    if absent:
        raise ValueError(
            f"the checkpoint {where} holds only a part of its student, or "
            f"another one: no {', '.join(absent)} of the recorded shape; "
            "write the run's student out whole (topd export ... --output "
            "DIRECTORY) and give that directory"
        )
    return {name: paths[name] for name in table}


def _restore(
    handler: ocp.PyTreeCheckpointHandler,
    state: epath.Path,
    path: tuple[str, ...],
    sharding: Any,
    dtype: str,
) -> jax.Array:
    """Read one array of a checkpoint, and no other."""
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    item: Any = 0
    args: Any = ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)
    for key in reversed(path):
        item, args = {key: item}, {key: args}
    tree = handler.restore(
        state,
        args=ocp.args.PyTreeRestore(
            item, restore_args=args, partial_restore=True
        ),
    )
    for key in path:
        tree = tree[key]
    jax.block_until_ready(tree)
    gc.collect(0)  # as in streaming.stream
    return tree
