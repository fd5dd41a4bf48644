"""Run several processes as one program, as a pod of several hosts does.

Every process runs the same command and calls the same jitted functions; each
feeds its own rows of the batch. Only the first writes logs, settings and the
tiny world's models. All must see the same work directory.
"""

import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from topd_jax.parallel import stopping

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10

# Set by start().
_heartbeat_seconds = 0


def start(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the other processes; call it before anything touches a device.

    Args:
      coordinator: ``HOST:PORT`` of the first process; None lets JAX find it
        (Cloud TPU, SLURM, Kubernetes), and the two below.
      count: number of processes.
      index: of this process; 0 is the first.
      heartbeat_seconds: silence after which a process counts as dead and the
        others stop with an error.

    Raises:
      ValueError: for arguments that do not go together.
    """
    flags = {"coordinator": coordinator, "processes": count, "process": index}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
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
    stopping.pass_to_jax()


def leave(error: BaseException) -> NoReturn:
    """End this process of several after an error, with exit code 2.

    Python's own exit would wait for the others, which wait for this one. If
    a collective failed, another process most likely died: this one then waits
    until the heartbeat has shown which, and JAX ends all of them with an
    error that names it. A process that left at once would be named too.

    Args:
      error: already printed.
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
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Wait until every process has reached the same point.

    Args:
      name: of the point; the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(number: int) -> int:
    """Return the first process's number to every process.

    Args:
      number: of this process, of 32 bits with its sign.
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def told_to_stop(step: int) -> int:
    """Return the signal that asks to stop now (preemption, or a user).

    In processes that :func:`start` joined, JAX catches the signal of any and
    tells all after the same step; alone, see
    :func:`~topd_jax.parallel.stopping.asked`.

    Args:
      step: just taken; every process must ask after every step.

    Returns:
      The signal's number, 0 for none.
    """
    if multihost_utils.reached_preemption_sync_point(step):
        return signal.SIGTERM
    return stopping.asked()


def on_host(tree: Any) -> Any:
    """Gather arrays to the host, whole, as NumPy arrays.

    Args:
      tree: of arrays; every process must call this with the same tree.

    Returns:
      The tree; leaves that are no arrays are unchanged.
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        if x.is_fully_replicated:
            return jax.device_get(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def wait_for(paths: Sequence[pathlib.Path]) -> None:
    """Wait for files of the first process, however long that takes.

    Not a collective, which would time out: if the first process dies, the
    heartbeat ends this one.

    Args:
      paths: files or directories that appear atomically.
    """
    if not all(p.exists() for p in paths):
        logging.info("waiting for the first process to write %s", paths[0])
    while not all(p.exists() for p in paths):
        time.sleep(_POLL_SECONDS)
