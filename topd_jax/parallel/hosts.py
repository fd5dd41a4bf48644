"""Several processes as one program, as a pod of several hosts runs it (ours).

Every process runs the same command and calls the same jitted phases; each
feeds its own rows of the batch. The first alone writes: logs, settings, the
tiny world's models. All must see one work directory. A process that has no
device of some mesh calls that mesh's programs too, decides what the others
decide, and holds nothing of their arrays.
"""

import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from topd_jax.parallel import transfers

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10

# What the processes have been told; they stay with it.
_heartbeat_seconds = 0


def start(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the other processes; before anything touches a device.

    Args:
      coordinator: ``HOST:PORT`` of the first process; None lets JAX find it
        (Cloud TPU, SLURM, Kubernetes), and the two below.
      count: of processes.
      index: of this one, 0 is the first.
      heartbeat_seconds: of silence, after which a process counts as dead and
        the others stop with an error.

    Raises:
      ValueError: for arguments that do not go together.
    """
    given = {"coordinator": coordinator, "processes": count, "process": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} missing: --coordinator HOST:PORT, "
            "--processes N and --process I go together; on Cloud TPU give "
            "--distributed alone"
        )
    if count is not None and not 0 <= index < count:
        raise ValueError(
            f"--process={index} must be in 0..{count - 1}, below "
            f"--processes={count}"
        )
    global _heartbeat_seconds
    _heartbeat_seconds = heartbeat_seconds
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=heartbeat_seconds
    )


def leave(error: BaseException) -> NoReturn:
    """Ends this process of several after an error; exit code 2.

    Python's own exit would wait for the others, which wait for this one. A
    collective that failed is most likely another process that died: this one
    then stays until the heartbeat has found out which, and JAX ends all with
    an error that names it. Whoever left at once would be named too.

    Args:
      error: that has been shown.
    """
    broken = isinstance(error, jax.errors.JaxRuntimeError)
    if broken and "RESOURCE_EXHAUSTED" not in str(error):
        wait = _heartbeat_seconds + 2 * _GRACE_SECONDS
        print(
            f"topd: process {jax.process_index()}: was another lost? Waiting "
            f"up to {wait} s to hear which",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(wait)
    os._exit(2)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until every process has come to the same place.

    Args:
      name: of the place; the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def told_to_stop(step: int) -> bool:
    """Whether SIGTERM has come to any process (a preemption, or a user).

    JAX catches the signal in every process that :func:`start` made one of
    several. A process alone ends by it, at once.

    Args:
      step: just taken; every process must ask after every step.

    Returns:
      True after the same step in all of them, the next that all can take.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def on_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole, wherever their parts are.

    Args:
      tree: of arrays; the same in every process, which must all call this.
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        if x.is_fully_replicated:
            return jax.device_get(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, transfers.within_reach(tree))


def share_of(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch a process feeds.

    Args:
      mesh: that the batch is spread over.

    Returns:
      (place of this process among those with devices of the mesh, 0 where it
      has none and feeds nothing; how many they are).
    """
    having = sorted(transfers.owners(mesh))
    own = jax.process_index()
    return having.index(own) if own in having else 0, len(having)


def wait_for(paths: Sequence[pathlib.Path]) -> None:
    """Waits for what the first process writes, however long that takes.

    Not a collective, which would time out: if the first process dies, the
    heartbeat ends this one.

    Args:
      paths: of files or directories that appear whole.
    """
    if not all(p.exists() for p in paths):
        logging.info("waiting for the first process to write %s", paths[0])
    while not all(p.exists() for p in paths):
        time.sleep(_POLL_SECONDS)
