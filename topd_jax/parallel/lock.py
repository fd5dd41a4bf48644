"""One process at a time writes into a directory.

``DIRECTORY/run.lock`` names its holder, and counts its beats. On the same
machine a holder is dead where its process is. On another one it is where the
count stands still, by the clock of whoever watches: clocks of several hosts
differ. So a run that was killed, or whose machine is gone, is in nobody's way.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from topd_jax.parallel import buckets, hosts

NAME = "run.lock"
_BEAT = 5.0  # seconds between two beats
# Seconds without a beat after which a holder on another machine is gone. A
# mounted bucket may show what it was a minute ago.
_PATIENCE = 75.0
_POLL = 0.5  # seconds between two looks at another's lock
# Bytes of a lock file, so that each beat overwrites the one before.
_SIZE = 1024


@dataclasses.dataclass
class _Lock:
    """A lock that this process holds.

    Attributes:
      path: of the file.
      owner: its contents.
      beaten: when it was last known to be this process's.
      taker: who has it now, where it was taken.
    """

    path: pathlib.Path
    owner: dict[str, Any]
    beaten: float
    taker: str = ""

    def beat(self) -> None:
        """Count on, or notice that the lock was taken."""
        now = _now()
        try:
            with _opened(self.path) as file:
                there = _read(file)
                if there and there["token"] != self.owner["token"]:
                    self.taker = _describe(there)
                    return
                self.owner["beat"] += 1
                if _write(file, self.owner):
                    self.beaten = now
        except FileNotFoundError:
            self.taker = f"someone who removed {self.path}"

    def keep(self, done: threading.Event) -> None:
        """Beat until done."""
        while not done.wait(_BEAT):
            # The next one may succeed; clients of buckets raise anything.
            with contextlib.suppress(Exception):
                self.beat()

    def release(self) -> None:
        """Remove the file, unless it is another's by now."""
        with contextlib.suppress(Exception), _opened(self.path) as file:
            if (_read(file) or {}).get("token") == self.owner["token"]:
                file.remove()


# Those of this process; None where the first of several has it.
_held: dict[pathlib.Path, _Lock | None] = {}


@contextlib.contextmanager
def held(directory: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory while the block runs; again within it does nothing.

    Of several processes that are one program, the first holds it, and all are
    refused where it is.

    Args:
      directory: made where it is missing, and removed if it stays empty.
      wait: whether to wait for a living holder instead of refusing; of several
        processes the first alone calls this then.

    Raises:
      ValueError: naming the living holder, or a process that does not see what
        the first has written there.
      OSError: where nothing can be written.
    """
    remote = buckets.is_remote(directory)
    path = (directory if remote else directory.resolve()) / NAME
    if path in _held:
        yield
        return
    _held[path] = None
    with contextlib.ExitStack() as stack:
        stack.callback(_held.pop, path)

        def take() -> None:
            _held[path] = stack.enter_context(_taken(path, wait))

        # No device is touched alone: the holder may have them all.
        if jax.distributed.is_initialized() and not wait:
            hosts.from_first(take)
            seen = _appears(path)
            hosts.from_first(lambda: None)  # a collective would not wait
            hosts.require_same({f"sees {path}": seen})
        else:
            take()
        yield


def _appears(path: pathlib.Path) -> bool:
    """Whether this process sees a file of the first, by now or soon."""
    until = _now() + _PATIENCE
    while not (there := path.exists()) and _now() < until:
        time.sleep(_POLL)
    return there


@contextlib.contextmanager
def _taken(path: pathlib.Path, wait: bool) -> Iterator[_Lock]:
    """Hold a lock in this process while the block runs."""
    directory = path.parent
    remote = buckets.is_remote(directory)
    fresh = not remote and not directory.exists()
    if not remote:  # a bucket has no folders to make
        directory.mkdir(parents=True, exist_ok=True)
    lock, done = _acquire(path, wait), threading.Event()
    beats = threading.Thread(target=lock.keep, args=(done,), daemon=True)
    beats.start()
    try:
        yield lock
    finally:
        done.set()
        beats.join()
        lock.release()
        if fresh:  # a run that was refused leaves nothing
            with contextlib.suppress(OSError):
                directory.rmdir()


def confirm() -> None:
    """Make sure that this process still holds its locks, before it writes.

    Raises:
      ValueError: where one was taken while this process was suspended.
    """
    for lock in filter(None, list(_held.values())):
        if _now() - lock.beaten > _PATIENCE / 2:
            lock.beat()
        if lock.taker:
            raise ValueError(
                f"{lock.path.parent} was taken over by {lock.taker}, as "
                f"nothing was heard of this process for {_PATIENCE:.0f} s; "
                "stopped before writing more into it"
            )


def _acquire(path: pathlib.Path, wait: bool) -> _Lock:
    """Take a lock that is free, or whose holder is dead."""
    owner = _identity()
    seen, since = None, 0.0
    while True:
        with _opened(path, os.O_CREAT) as file:
            now, there = _now(), _read(file)
            silent = there == seen and now - since > _PATIENCE
            # A write that a bucket did and did not answer was repeated.
            mine = there and there["token"] == owner["token"]
            if there is None or mine or _has_ended(there) or silent:
                if _write(file, owner):
                    return _Lock(path, owner, now)
                continue
        if not wait and (_is_here(there) or seen not in (None, there)):
            raise ValueError(
                f"{path.parent} is in use by {_describe(there)}; stop that "
                "process first, or use another --workdir"
            )
        if seen is None:
            logging.warning(
                "waiting for %s, which holds %s", _describe(there), path.parent
            )
        if there != seen:
            seen, since = there, now
        time.sleep(_POLL)


def _identity() -> dict[str, Any]:
    """Return what the file of a new lock says."""
    program, *arguments = sys.argv
    name = pathlib.Path(program).name.replace("__main__.py", "topd")
    return {
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([name, *arguments])[: _SIZE // 2],
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _machine() -> list[str]:
    """Return the host, its boot, and the namespace of its process numbers."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # another system: as if each process had its machine
        boot, space = uuid.uuid4().hex, ""
    return [socket.gethostname(), boot.strip(), space]


def _started(pid: int) -> str | None:
    """Return when a process began, in ticks; None where it does not run."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may hold anything: state, then fields 4 and on.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _is_here(owner: dict[str, Any]) -> bool:
    return owner["machine"] == _machine()


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether a holder was on this machine, and is no more."""
    # A lock of this very process would be known.
    gone = _started(owner["pid"]) != owner["started"]
    return _is_here(owner) and (gone or owner["pid"] == os.getpid())


def _describe(owner: dict[str, Any]) -> str:
    return (
        f"process {owner['pid']} on {owner['machine'][0]} since "
        f"{owner['since']} ({owner['command']})"
    )


def _now() -> float:
    """Return seconds that go on while the machine is suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class _File:
    """A lock file on a disk that is open."""

    def __init__(self, path: pathlib.Path, file: int) -> None:
        self._path, self._file = path, file

    def read(self) -> bytes:
        return os.pread(self._file, 4 * _SIZE, 0)

    def write(self, data: bytes) -> bool:
        try:
            os.ftruncate(self._file, os.pwrite(self._file, data, 0))
        except OSError as error:
            raise OSError(
                error.errno, error.strerror, str(self._path)
            ) from error
        return True

    def remove(self) -> None:
        self._path.unlink()


@contextlib.contextmanager
def _opened(
    path: pathlib.Path, flags: int = 0
) -> Iterator[_File | buckets.Blob]:
    """Open a lock for an instant.

    On a disk one process at a time has it open; in a bucket a write of any but
    the first fails.
    """
    if buckets.is_remote(path):
        yield buckets.Blob(path, create=bool(flags))
        return
    while True:
        file = os.open(path, os.O_RDWR | flags, 0o666)
        try:
            with contextlib.suppress(OSError):  # not every file system can
                fcntl.flock(file, fcntl.LOCK_EX)
            # Else its holder removed it meanwhile.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
                yield _File(path, file)
                return
        finally:
            os.close(file)


def _read(file: _File | buckets.Blob) -> dict[str, Any] | None:
    """Return the holder; None where none is named, or only in part."""
    try:
        owner = json.loads(file.read() or b"")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and "token" in owner else None


def _write(file: _File | buckets.Blob, owner: dict[str, Any]) -> bool:
    """Write the holder; return False if another did since it was read."""
    return file.write(json.dumps(owner).ljust(_SIZE).encode())
