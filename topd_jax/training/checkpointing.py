"""Checkpoints with orbax.

A checkpoint holds the train state (what is trained of the student, optimizer,
step), the run's PRNG key, the position in the data, and a record of what it
belongs to (:mod:`topd_jax.training.identity`). What is not trained is never
saved.
"""

import pathlib
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from topd_jax.models.io import checksums
from topd_jax.parallel import buckets, hosts, lock
from topd_jax.training.identity import FORMAT

# An array is stored in pieces of at most this: whoever reads a part of it, or
# spreads it over other devices, unpacks the pieces of that part alone.
_CHUNK_BYTES = 8 << 20
# A save that takes longer hangs; seconds that passed, whatever clocks say.
_SAVE_SECONDS = 7200
_NEVER = 10 * 365 * 24 * 3600


class Checkpoints:
    """The checkpoints of one run, in a directory of their own."""

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        """Open (or make) the directory.

        Args:
          directory: where they are.
          keep: how many of the latest checkpoints stay.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._saving: int | None = None
        self._in_background = False
        self._manager = ocp.CheckpointManager(
            buckets.absolute(directory),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(
                    # Orbax's limits, that of a directory fixed, are of the
                    # wall clock, which may jump; see wait.
                    timeout_secs=_NEVER,
                    create_directories_asynchronously=False,
                    # In the background, of the first process alone.
                    post_finalization_callback=self._write_checksums,
                ),
            ),
            # Not by the names that lie beside a checkpoint, unverified.
            item_handlers={
                checksums.STATE: ocp.StandardCheckpointHandler(),
                checksums.RECORD: ocp.JsonCheckpointHandler(),
            },
        )

    def _write_checksums(self) -> None:
        # Not yet complete: checksums are committed with the rest.
        place = self._directory / str(self._saving)
        if not buckets.is_remote(place):  # still under another name
            (place,) = self._directory.glob(f"{self._saving}.*")
        checksums.write_checksums(place)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def newest_intact(self, *, required: bool = True) -> int | None:
        """Return the step of the newest checkpoint whose files are intact.

        Newer, damaged ones are renamed to ``damaged-STEP``, so that their
        steps can be saved again. The first process reads the files, and every
        process must call this.

        Args:
          required: whether it is an error if there are checkpoints and none
            is intact; if not, all of them are renamed.

        Raises:
          ValueError: naming every checkpoint's damage; nothing is renamed.
        """
        self.wait()
        found = hosts.from_first(lambda: self._skip_damaged(required))
        self._manager.reload()
        return found

    def _skip_damaged(self, required: bool) -> int | None:
        found, damage = None, {}
        for step in reversed(self.steps()):
            fault = checksums.find_damage(self._directory / str(step))
            if not fault:
                found = step
                break
            damage[step] = fault
        if damage and found is None and required:
            told = "; ".join(f"{s}: {fault}" for s, fault in damage.items())
            raise ValueError(
                f"no checkpoint in {self._directory} is intact ({told}); put "
                "one back from a backup, or remove the directory to train "
                "from the start"
            )
        for step, fault in damage.items():
            self._move_aside(step, fault)
        return found

    def _move_aside(self, step: int, fault: str) -> None:
        place = self._directory / str(step)
        aside = self._directory / f"damaged-{step}"
        buckets.remove(aside)  # of the same step, once before
        place.rename(aside)
        logging.warning(
            "the checkpoint %s is damaged: %s; moved to %s", place, fault, aside
        )

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, the oldest first."""
        return sorted(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        self.wait()  # orbax would delete what is being written, and fail
        for saved in self.steps():
            if saved > step:
                self._manager.delete(saved)

    def save(
        self, step: int, state: Any, key: jax.Array, record: dict[str, Any]
    ) -> None:
        """Save a checkpoint in the background; it exists whole or not at all.

        Returns once the state is copied to the host: it may be donated then.
        An error of the one before is raised here. A run that repeats steps
        finds its own checkpoints again, bit for bit, and leaves them.

        Args:
          step: updates made so far.
          state: the train state, any pytree of arrays.
          key: the run's PRNG key.
          record: what :func:`record` returns, and the data's position.

        Raises:
          ValueError: where another process has taken the work directory.
        """
        lock.confirm()
        latest = self.latest()
        if latest is not None and latest >= step:
            return
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
        self.wait()  # before the name that the one before is under changes
        self._saving, self._in_background = step, False
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(
                    item, jax.tree.map(lambda _: options, item)
                ),
                record=ocp.args.JsonSave(record | _key_record(key)),
            ),
        )
        # One that fails before this stays in progress for orbax.
        self._in_background = True

    def wait(self) -> None:
        """Wait until every checkpoint is on disk.

        Raises:
          OSError: what went wrong; TimeoutError for a save that takes hours.
        """
        started = time.monotonic()
        while self._in_background and self._manager.is_saving_in_progress():
            if time.monotonic() - started > _SAVE_SECONDS:
                raise TimeoutError(
                    f"saving a checkpoint in {self._directory} was waited for "
                    f"for over {_SAVE_SECONDS} s; the steps since the one "
                    "before it are not saved. See that this storage answers, "
                    "and start the same command again"
                )
            time.sleep(0.01)
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            error.filename = error.filename or str(self._directory)
            raise

    def record(self, step: int) -> dict[str, Any]:
        """Read the record of a checkpoint alone.

        Raises:
          ValueError: for one of another format.
        """
        saved = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]
        if saved.get("format", 1) != FORMAT:
            raise ValueError(
                f"the checkpoint {self._directory / str(step)} has format "
                f"{saved.get('format', 1)} and this version of topd_jax reads "
                f"format {FORMAT}; finish or export the run with the version "
                "that began it, or use another --workdir"
            )
        return saved

    def restore(self, step: int, state: Any) -> tuple[Any, jax.Array]:
        """Read a checkpoint into the shardings of ``state``.

        Args:
          step: which one.
          state: a train state of the right shapes, dtypes and shardings
            (arrays or ``ShapeDtypeStruct``).

        Returns:
          (train state, PRNG key, of the implementation that it was made by).
        """
        kind = self.record(step)["key"]
        target = {
            "train": jax.tree.map(ocp.utils.to_shape_dtype_struct, state),
            "key": np.zeros(kind["shape"], np.uint32),
        }
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
        )["state"]
        key = jax.random.wrap_key_data(saved["key"], impl=kind["impl"])
        return saved["train"], key

    def close(self) -> None:
        """Wait for what is being written, and release the directory."""
        self.wait()
        self._manager.close()


def _key_record(key: jax.Array) -> dict[str, Any]:
    shape = list(jax.random.key_data(key).shape)
    return {"key": {"impl": str(jax.random.key_impl(key)), "shape": shape}}


def _is_shared(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable
