"""Checkpoints with orbax, and what must agree before one is resumed.

A checkpoint holds the train state (what is trained of the student, optimizer,
step), the run's PRNG key, the position in the data, and a record of what it
belongs to: the settings, the fingerprints of the teacher and of what the
student does not train, and the student's shape, by which other runs load it
(:mod:`topd_jax.models.io.runs`). What is not trained is never saved.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from topd_jax.models import DecoderConfig
from topd_jax.models.io import runs
from topd_jax.parallel import hosts, transfers
from topd_jax.parallel.sharding import replicated
from topd_jax.training.config import NO_IDENTITY, Settings, defaults_of
from topd_jax.training.sections import flat

# Settings that may differ between a run and its continuation: they change
# what is written down, not what is computed.
_FREE = (
    *("log", "checkpoint", "sweep", "world.cache"),
    *NO_IDENTITY,
    "teacher_mesh",  # the same step, whatever devices the teacher has
    *("offline.format", "offline.shard_size"),
)

# An array is stored in pieces of at most this: whoever reads a part of it, or
# spreads it over other devices, unpacks the pieces of that part alone.
_CHUNK_BYTES = 8 << 20


class Checkpoints:
    """The checkpoints of one run, in a directory of their own."""

    def __init__(
        self, directory: pathlib.Path, keep: int, mesh: Mesh | None = None
    ) -> None:
        """Opens (or makes) the directory.

        Args:
          directory: where they are.
          keep: how many of the latest checkpoints stay.
          mesh: that the train state is on; the processes with devices of it
            write and read it. None: all.
        """
        directory.mkdir(parents=True, exist_ok=True)
        holders, self._saved = transfers.holders(mesh), None
        self._all = holders is None
        self._holds = self._all or jax.process_index() in holders
        options = dict(max_to_keep=keep, enable_async_checkpointing=False)
        if not self._all:
            options["create"] = False
            options["multiprocessing_options"] = (
                ocp.options.MultiprocessingOptions(active_processes=holders)
            )
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(**options)
            if self._holds
            else runs.reading(),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        if self._saved is not None:
            return self._saved
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, key: jax.Array, record: dict[str, Any]
    ) -> None:
        """Writes a checkpoint; it exists whole or not at all.

        A run that repeats steps finds its own checkpoints again, bit for
        bit, and leaves them.

        Args:
          step: updates made so far.
          state: the train state, any pytree of arrays.
          key: the run's PRNG key.
          record: what :func:`record` returns, and the data's position.
        """
        latest = self.latest()
        if latest is not None and latest >= step:
            return
        if self._holds:
            self._write(step, state, key, record)
        else:
            self._saved = step
        if not self._all:  # nobody goes on, or ends, before it is written
            hosts.meet(f"checkpoint {step}")

    def _write(
        self, step: int, state: Any, key: jax.Array, record: dict[str, Any]
    ) -> None:
        item = {
            "train": state,
            # NumPy: a key must not remember the devices it was on.
            "key": np.asarray(jax.random.key_data(key)),
        }
        if jax.process_count() > 1:
            # Of several processes, orbax takes no array that one holds whole.
            item = jax.tree.map(
                lambda x: x if _is_shared(x) else jax.device_get(x), item
            )
        options = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(
                    item, jax.tree.map(lambda _: options, item)
                ),
                record=ocp.args.JsonSave(record),
            ),
        )
        self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Reads the record of a checkpoint alone."""
        return self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]

    def restore(self, step: int, state: Any) -> tuple[Any, jax.Array]:
        """Reads a checkpoint into the shardings of ``state``.

        Args:
          step: which one.
          state: a train state of the right shapes, dtypes and shardings
            (arrays or ``ShapeDtypeStruct``).

        Returns:
          (train state, PRNG key); a process without devices of the mesh
          gets arrays without parts, as elsewhere.
        """
        if not self._holds:
            key = jax.ShapeDtypeStruct(
                (2,), np.uint32, sharding=replicated(_mesh_of(state))
            )
            state, key = jax.tree.map(transfers.nothing_of, (state, key))
            return state, jax.random.wrap_key_data(key)
        target = {
            "train": jax.tree.map(ocp.utils.to_shape_dtype_struct, state),
            "key": np.zeros(2, np.uint32),
        }
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
        )["state"]
        return found["train"], jax.random.wrap_key_data(found["key"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _is_shared(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _mesh_of(state: Any) -> Mesh:
    return jax.tree.leaves(state)[0].sharding.mesh


def has_steps(directory: pathlib.Path) -> bool:
    """Whether a directory holds a complete checkpoint."""
    # One that is being written has a longer name.
    return any(p.name.isdigit() for p in directory.glob("*"))


def record(
    settings: Settings,
    teacher: str | dict[str, str],
    position: dict[str, Any],
    student: DecoderConfig | None,
    *,
    frozen: str = "",
) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Args:
      settings: of the run.
      teacher: the teacher's fingerprint; of several, name -> fingerprint.
      position: the data iterator's state, JSON-able.
      student: its shape, so that others can load it from here; None for a
        student that is no decoder.
      frozen: fingerprint of what the student does not train; "": nothing.

    Returns:
      A JSON-able dictionary.
    """
    shape = {} if student is None else {"student": student.to_dict()}
    return {
        "settings": settings.to_dict(),
        "teacher": teacher,
        "frozen": frozen,
        "data": position,
    } | shape


def require_same_run(
    found: dict[str, Any],
    settings: Settings,
    teacher: str | dict[str, str],
    where: str,
    *,
    frozen: str = "",
    free: tuple[str, ...] = (),
) -> None:
    """Refuses to continue another run's checkpoint.

    Args:
      found: the record of the checkpoint.
      settings: of the run that wants to continue it.
      teacher: fingerprint of its teacher; of several, name -> fingerprint.
      where: the checkpoint's directory, for the error.
      frozen: fingerprint of what its student does not train.
      free: sections that may differ besides those that change nothing: a
        student is read, and not trained on.

    Raises:
      ValueError: naming every setting that differs, or the teacher, or the
        model under the student's adapters.
    """
    out = "; use another --workdir, or the settings it was started with"
    # A setting that is younger than the checkpoint was at its default there.
    before = defaults_of(settings.to_dict()) | flat(found["settings"])
    now = flat(settings.to_dict())
    differing = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(
            name == f or name.startswith(f + ".") for f in (*_FREE, *free)
        )
    ]
    if differing:
        raise ValueError(
            f"the checkpoint in {where} belongs to a run with other settings "
            f"({'; '.join(differing)}){out}"
        )
    # The settings agree, and with them the names of several teachers.
    there, here = (
        t if isinstance(t, dict) else {"": t}
        for t in (found["teacher"], teacher)
    )
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"the checkpoint in {where} was made with another teacher "
                + (f"{name!r} " if name else "")
                + f"(fingerprint {there.get(name)} there, {here.get(name)} "
                f"here){out}"
            )
    # Before there were adapters everything was trained.
    before = found.get("frozen", "")
    if before != frozen:
        raise ValueError(
            f"the checkpoint in {where} holds adapters of another model, or "
            f"of another scale (fingerprint {before or 'none'} there, "
            f"{frozen or 'none'} here){out}"
        )


def cut_log(path: pathlib.Path, step: int) -> None:
    """Drops the lines of a JSONL log that are past a step.

    Args:
      path: the log; nothing happens where it does not exist.
      step: the checkpoint's step; a line's own is its field "step". A line
        that was cut off while it was written is dropped too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)
