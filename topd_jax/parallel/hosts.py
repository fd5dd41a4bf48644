"""Run several processes as one program, as a pod of several hosts does.

Every process runs the same command, makes the same batches and calls the same
jitted functions. Only the first grades, prints and writes. All must see the
same work directory.
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from topd_jax.parallel import stopping

_GRACE_SECONDS = 10
# For which the first stays after an error: without it the others end at once,
# and could not say what they found.
_LAST_SECONDS = 2
# For which the others wait for the first: it may have much to do.
_PATIENCE_MS = 7 * 24 * 3600 * 1000

# Set by start().
_heartbeat_seconds = 0
# Of the calls of from_first: each barrier needs a name of its own.
_calls = itertools.count()
# The last answer of told_to_stop(), still being computed.
_told: jax.Array | None = None


def start(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    heartbeat_seconds: int = 100,
    in_steps: bool = True,
) -> None:
    """Join the other processes; call it before anything touches a device.

    Args:
      coordinator: ``HOST:PORT`` of the first process; None lets JAX find it
        (Cloud TPU, SLURM, Kubernetes), and the two below.
      count: number of processes.
      index: of this process; 0 is the first.
      heartbeat_seconds: silence after which a process counts as dead and the
        others stop with an error.
      in_steps: whether a signal waits until all have made the same step, see
        :func:`told_to_stop`; if not, it ends the process that it reaches.

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
    # Its handler would hide SIGTERM, and a second one, from ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=heartbeat_seconds
    )
    if in_steps:
        stopping.stop_together()


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuse to go on where processes are not the same program.

    Args:
      facts: name -> what must be the same in every process, JSON-able.

    Raises:
      ValueError: in every process, naming one that differs from the first,
        and all in which it does.
    """
    first, *others = map(json.loads, _gather(json.dumps(facts)))
    for index, there in enumerate(others, start=1):
        differing = [
            f"{name}: {first.get(name)!r} in the first, {there.get(name)!r} "
            f"in process {index}"
            for name in sorted(first.keys() | there.keys())
            if first.get(name) != there.get(name)
        ]
        if differing:
            raise ValueError(
                f"process {index} runs something else than the first "
                f"({'; '.join(differing)}); give all processes the same "
                "version, command and config, and a directory that all share"
            )


def _gather(text: str) -> list[str]:
    """Return the texts of all processes, the first's first."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.pad(data, (0, sizes.max() - data.size))
    gathered = multihost_utils.process_allgather(padded)
    return [
        bytes(row[:size]).decode()
        for row, size in zip(gathered, sizes, strict=True)
    ]


def _broadcast(text: str) -> str:
    """Return the first process's text in all of them."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    # The others send no text: devices hold it once, not once a process.
    sent = data if is_first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(sent)).decode()


def leave(error: BaseException, code: int) -> NoReturn:
    """End this process of several after an error.

    Python's own exit would wait for the others, which wait for this one. If
    a collective failed, another process most likely died: this one then waits
    until the heartbeat has shown which, and JAX ends all of them with an
    error that names it. A process that left at once would be named too.

    Args:
      error: already printed.
      code: to exit with.
    """
    # Where a dispatched program fails at once, JAX makes a ValueError of it.
    status = re.match(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED): ", str(error))
    broken = status or isinstance(error, jax.errors.JaxRuntimeError)
    if broken and "RESOURCE_EXHAUSTED" not in str(error):
        wait = _heartbeat_seconds + 2 * _GRACE_SECONDS
        print(
            f"topd: process {jax.process_index()}: was another lost? Waiting "
            f"up to {wait} s to hear which",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(wait)
    elif is_first():
        time.sleep(_LAST_SECONDS)
    os._exit(code)


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(call: Callable[[], Any]) -> Any:
    """Call a function in the first process, and return its result in all.

    Args:
      call: what only one process may do, or must decide. Every process must
        come here; the others do not call it, and wait.

    Returns:
      What it returned, which must be JSON-able.

    Raises:
      Exception: what it raised; in the other processes a ValueError with the
        same text.
    """
    if jax.process_count() == 1:
        return call()
    told, raised = {}, None
    if is_first():
        try:
            told = {"result": call()}
        except Exception as error:
            told, raised = {"error": str(error)}, error
    # No collective, which would time out; it imports the rest of orbax.
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(
        key=f"topd_from_first_{next(_calls)}", timeout_ms=_PATIENCE_MS
    )
    told = json.loads(_broadcast(json.dumps(told)))
    if raised is not None:
        raise raised
    if "error" in told:
        raise ValueError(told["error"])
    return told["result"]


def told_to_stop(*, wait: bool = False) -> int:
    """Return the signal that asks any process to stop now; 0 for none.

    Every process must call this after every step, and is told the same. The
    answer of several is computed on their devices after the step, and read
    after the next one: no step waits for it.

    Args:
      wait: whether to wait for the answer of this step.
    """
    global _told
    number = stopping.asked()
    if jax.process_count() == 1:
        return number
    before, _told = _told, _highest(number)
    answer = _told if wait or before is None else before
    return int(answer.addressable_data(0))


def _highest(number: int) -> jax.Array:
    """Compute the highest number of all processes."""
    mesh = Mesh(np.array(jax.devices()), "devices")
    parts = multihost_utils.host_local_array_to_global_array(
        np.full(jax.local_device_count(), number, np.int32),
        mesh, PartitionSpec("devices"),
    )  # fmt: skip
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jnp.max, out_shardings=everywhere)(parts)


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
