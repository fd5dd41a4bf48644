"""Students of our own runs, read from their checkpoints (ours).

A work directory of ``topd train`` holds ``checkpoints/STEP`` and
``best/STEP``. Of a checkpoint the student alone is read, one parameter at a
time, straight into its shards; the optimizer's state stays on disk. Its shape
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
from jax.sharding import Mesh, SingleDeviceSharding

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.streaming import (
    Finish,
    block_bytes,
    local_blocks,
    progress,
)
from topd_jax.models.io.weights import shardings_of
from topd_jax.models.parameters import parameter_table
from topd_jax.parallel.sharding import Rules
from topd_jax.parallel.transfers import nothing_of

# Folders of a work directory: "latest" and "best" on the command line.
LATEST, BEST = "checkpoints", "best"
SETTINGS, TOKENIZER = "settings.json", "tokenizer"


def is_run(source: str | os.PathLike) -> bool:
    """Whether a path leads into a work directory of ``topd train``.

    Args:
      source: the directory itself, its ``checkpoints`` or ``best``, or one
        step in these.
    """
    if (Path(source) / "config.json").is_file():  # a model's directory
        return False
    root, _, _ = _split(Path(source))
    return (root / SETTINGS).is_file() or any(
        _steps(root / folder) for folder in (LATEST, BEST)
    )


def tokenizer_directory(source: str | os.PathLike) -> Path:
    """Where a run keeps its tokenizer; ``source`` as in :func:`is_run`."""
    return _split(Path(source))[0] / TOKENIZER


def load_run(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    finish: Finish | None = None,
) -> Decoder:
    """Loads the student of a run.

    Args:
      source: a work directory (its latest checkpoint), its ``best``, or one
        step: ``WORKDIR/checkpoints/STEP``.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: see :class:`~topd_jax.models.config.DecoderConfig`.
      unroll: see the same.
      mesh: where to spread the parameters; None is one device.
      rules: logical axis -> mesh axis; None takes the default rules.
      finish: see :func:`~topd_jax.models.io.weights.assemble`.

    Returns:
      The student.

    Raises:
      ValueError: where there is no such checkpoint, naming those there are,
        or it says too little of itself or holds only a part of its student.
    """
    folder, step = _find(Path(source))
    where = folder / str(step)
    with _opened(folder) as manager:
        config = _config(manager, step, where).replace(
            dtype=dtype, param_dtype=param_dtype, remat=remat, unroll=unroll
        )
        shardings = shardings_of(config, mesh, rules)
        paths = _paths(manager, step, config, where)
        total = sum(
            block_bytes(local_blocks(row.shape, shardings[name]), param_dtype)
            for name, row in parameter_table(config).items()
        )
        arrays = {}
        logging.info("the student of %s is read", where)
        with progress(str(source), total) as advance:
            for name, path in paths.items():
                shape = parameter_table(config)[name].shape
                shards = local_blocks(shape, shardings[name])
                if shards:
                    array = _restore(
                        manager, step, path, shardings[name], param_dtype
                    )
                else:  # on devices of other processes
                    array = nothing_of(
                        jax.ShapeDtypeStruct(
                            shape, param_dtype, sharding=shardings[name]
                        )
                    )
                advance(block_bytes(shards, param_dtype))
                arrays[name] = array if finish is None else finish(name, array)
    return Decoder(config, arrays)


def run_config(source: str | os.PathLike) -> DecoderConfig:
    """The shape of a run's student, from its checkpoint's record.

    Args:
      source: as in :func:`load_run`.

    Raises:
      ValueError: as there.
    """
    folder, step = _find(Path(source))
    with _opened(folder) as manager:
        return _config(manager, step, folder / str(step))


def reading() -> ocp.CheckpointManagerOptions:
    """Of a manager through which a process reads, whatever others do.

    Nothing is saved through it, and so nothing is dropped either.
    """
    own = jax.process_index()
    return ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}
        ),
    )


def _opened(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=reading(),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        },
    )


def _split(path: Path) -> tuple[Path, str, int | None]:
    """(work directory, folder in it, step if one is named)."""
    step = None
    if path.name.isdigit() and path.parent.name in (LATEST, BEST):
        step, path = int(path.name), path.parent
    if path.name in (LATEST, BEST) and not (path / SETTINGS).is_file():
        return path.parent, path.name, step
    return path, LATEST, step


def _steps(folder: Path) -> list[int]:
    """Complete checkpoints; one that is being written has a longer name."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def _find(source: Path) -> tuple[Path, int]:
    """The folder and step that a source means."""
    root, folder, wanted = _split(source)
    steps = _steps(root / folder)
    if steps and wanted in (None, *steps):
        return root / folder, steps[-1] if wanted is None else wanted
    there = [
        f"{root / name} (steps {', '.join(map(str, _steps(root / name)))})"
        for name in (LATEST, BEST)
        if _steps(root / name)
    ]
    raise ValueError(
        f"no checkpoint at {source}: "
        + (f"there is {' and '.join(there)}" if there else "train first")
    )


def _config(
    manager: ocp.CheckpointManager, step: int, where: Path
) -> DecoderConfig:
    found = manager.restore(
        step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
    )["record"]
    if "student" not in found:
        raise ValueError(
            f"the checkpoint {where} was written before checkpoints named "
            "their student's shape, or its student is no decoder; a decoder "
            "is written out with the settings of its run (topd export ... "
            "--output DIRECTORY): give that directory"
        )
    return DecoderConfig.from_dict(found["student"])


def _paths(
    manager: ocp.CheckpointManager,
    step: int,
    config: DecoderConfig,
    where: Path,
) -> dict[str, tuple[str, ...]]:
    """parameter -> keys that lead to it in the saved train state."""
    saved = manager.item_metadata(step)["state"].tree
    leaves, _ = jax.tree_util.tree_flatten_with_path(saved["train"]["student"])
    paths, shapes = {}, {}
    for keys, leaf in leaves:
        names = tuple(key.key for key in keys)
        own = names[:-1] if names[-1] == "value" else names  # nnx.Param's
        paths[own[-1]] = ("train", "student", *names)
        shapes[own[-1]] = tuple(leaf.shape)
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
    manager: ocp.CheckpointManager,
    step: int,
    path: tuple[str, ...],
    sharding: Any,
    dtype: str,
) -> jax.Array:
    """Reads one array of a checkpoint, and no other."""
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    item: Any = 0
    args: Any = ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)
    for key in reversed(path):
        item, args = {key: item}, {key: args}
    tree = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item, restore_args=args, partial_restore=True
            )
        ),
    )["state"]
    for key in path:
        tree = tree[key]
    jax.block_until_ready(tree)
    gc.collect(0)  # as in streaming.stream
    return tree
