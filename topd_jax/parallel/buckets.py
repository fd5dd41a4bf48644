"""Files in a bucket (``gs://BUCKET/PATH``) beside those of a disk.

A path is :class:`pathlib.Path` on a disk and :class:`etils.epath.Path` in a
bucket; both read, write and list alike. What they do differently is here. In a
bucket an object appears whole or not at all; it never grows, it can replace
another one, and a folder cannot be renamed. On a disk nothing of this imports a
client of buckets.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

_SCHEMES = ("gs", "s3", "az", "hf")  # that epath knows
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")
# The way out of what may be over when the command is run again.
AWAY = "check that it can be reached"
# What an error says -> what to do about it.
_WAYS_OUT = {
    r"\b40[13]\b|Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|[Cc]redentials": (
        "allow this machine's account to use it (roles storage.objectUser and "
        "storage.legacyBucketReader)"
    ),
    r"\b404\b|NOT_FOUND|NotFound": "check that bucket and path exist",
    r"\b(429|5\d\d)\b|UNAVAILABLE|ABORTED|EXCEEDED|EXHAUSTED|[Cc]onnect": AWAY,
}
_SHOWN = 300  # characters of an error
_RETRY_SECONDS = 30.0  # that a lock asks again for, after errors 429 and 5xx

# Buckets that this process was told of.
_used: set[str] = set()


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path leads into a bucket."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike) -> Any:
    """Return a path on a disk, or in a bucket if it begins with ``gs://``.

    Args:
      path: as the user gives it; ``s3://``, ``az://`` and ``hf://`` can be
        read where fsspec's client of them is installed.

    Raises:
      ValueError: for another service, or where the client is not installed.
    """
    if not is_remote(path):
        return pathlib.Path(os.path.expanduser(path))  # --workdir=~/runs
    text = os.fspath(path)
    scheme, _, place = text.partition("://")
    if scheme not in _SCHEMES:
        raise ValueError(
            f"cannot open {text}: a bucket begins with one of "
            f"{', '.join(f'{s}://' for s in _SCHEMES)}"
        )
    import fsspec  # with a client of buckets, seconds
    from etils import epath

    # Other processes write there too.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"cannot open {text}: {error}; for gs:// pip install "
            "'topd_jax[gcs]'"
        ) from error
    # It shows a traceback of errors that are raised, or mended, as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    _used.add(f"{scheme}://{place.partition('/')[0]}")
    return epath.Path(text)


def absolute(path: Any) -> Any:
    """Return a path that does not depend on the current directory."""
    return path if is_remote(path) else path.absolute()


def files(folder: Any) -> list[str]:
    """List all files below a folder, relative to it, in order."""
    if is_remote(folder):
        return sorted(n for n in _listing(folder) if not n.endswith("/"))
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


def read_log(path: Any) -> bytes | None:
    """Return the lines of a log; None where there is none.

    Args:
      path: of the log; see :func:`is_in_parts`.
    """
    if is_remote(path):
        system, root = _system(path)
        found = system.find(root)
        parts = system.cat(found) if found else {}  # all at once
        return b"".join(parts[name] for name in sorted(parts)) or None
    if path.is_dir():
        return b"".join((path / name).read_bytes() for name in files(path))
    return path.read_bytes() if path.exists() else None


def is_in_parts(path: Any) -> bool:
    """Return whether a log is a folder of parts, or will be one.

    Args:
      path: of the log; a copy of a bucket on a disk has parts too.
    """
    return is_remote(path) or path.is_dir()


class LogParts:
    """A log in a bucket: lines are kept here, and uploaded in parts.

    ``NAME/000001`` and on, each written once. Lines that were not uploaded
    before a process is killed belong to steps after the checkpoint, which the
    run makes again.
    """

    def __init__(self, path: Any) -> None:
        """Go on after the parts that are there.

        Args:
          path: of the log.

        Raises:
          ValueError: where it is a file.
        """
        there = files(path)
        if "" in there:
            raise ValueError(
                f"{path} is one file, as a run on a disk writes it; move it to "
                f"{path}/000001"
            )
        self.name = str(path)
        self._path, self._lines = path, list[str]()
        self._last = max(map(int, there), default=0)

    def write(self, line: str) -> None:
        """Keep a line for the next part."""
        self._lines.append(line)

    def flush(self) -> None:
        """Do nothing: the next part will have the line."""

    def upload(self) -> None:
        """Upload what was written since the last part."""
        if self._lines:
            self._last += 1
            part = self._path / f"{self._last:06d}"
            part.write_text("".join(self._lines))
            self._lines.clear()

    close = upload


def write_whole(path: Any, text: str) -> None:
    """Write a file that exists whole or not at all, and outlives a power cut.

    Args:
      path: of the file; an older one is replaced.
      text: its contents.
    """
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove(folder: Any) -> None:
    """Remove a folder with all that is in it, where it exists."""
    if is_remote(folder):
        if files(folder):
            folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def uploaded(folder: Any, last: str = "") -> Iterator[pathlib.Path]:
    """Write a folder with a library that knows disks alone.

    Args:
      folder: on a disk or in a bucket.
      last: the file that is uploaded after all others: where it is, they are.

    Yields:
      The folder itself; for a bucket, an empty one on this machine, which is
      uploaded when the block has ended well.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        yield pathlib.Path(place)
        system, root = _system(folder)
        names = sorted(files(pathlib.Path(place)), key=lambda n: n == last)
        for name in names:
            system.put_file(f"{place}/{name}", f"{root}/{name}")


def copied(path: Any) -> pathlib.Path:
    """Return a copy on this machine of a file or folder in a bucket.

    It stays in ``~/.cache/topd_jax/buckets``, and is used again as long as the
    bucket has the same.

    Args:
      path: on a disk, which is returned as it is, or in a bucket.

    Raises:
      ValueError: where the bucket does not have it.
    """
    if not is_remote(path):
        return path
    listing = _listing(path)
    if not listing:
        raise ValueError(f"nothing at {path}; check the path")
    home = pathlib.Path(
        os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    )
    text = json.dumps([str(path), listing], sort_keys=True)
    place = home / "topd_jax" / "buckets"
    place /= hashlib.sha256(text.encode()).hexdigest()[:16]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        # A copy that breaks off is as large as a model: nothing of it stays.
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            fresh = pathlib.Path(folder, "whole")
            system, root = _system(path)
            for name in listing:
                target = fresh / path.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f"{root}/{name}".rstrip("/"), str(target))
            with contextlib.suppress(OSError):  # another process was faster
                fresh.rename(place)
    return place / path.name


def copy_within(source: Any, target: Any) -> None:
    """Copy a folder of a bucket to another place in it."""
    system, root = _system(source)
    there = _system(target)[1]
    for name in files(source):
        system.cp_file(f"{root}/{name}", f"{there}/{name}")


def explain(chain: Sequence[BaseException]) -> str | None:
    """Say in one line what is wrong with a bucket.

    Args:
      chain: an error and its causes.

    Returns:
      The line with its way out; None for an error that is about no bucket.
    """
    for error in chain:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        named = [
            b
            for b in _used
            if b in text or f"b/{b.partition('://')[2]}/" in text
        ]
        way_out = next(
            (w for m, w in _WAYS_OUT.items() if re.search(m, text)), ""
        )
        client = type(error).__module__.partition(".")[0] in _CLIENTS
        if _used and way_out and (named or client):
            where = " or ".join(named or sorted(_used))
            return f"{where}: {text[:_SHOWN]}; {way_out}"
    return None


class Blob:
    """An object that is changed only if it still is what was read."""

    def __init__(self, path: Any, *, create: bool) -> None:
        """Open it; nothing is read yet.

        Args:
          path: ``gs://BUCKET/NAME``.
          create: whether it may be missing.

        Raises:
          ValueError: for a bucket of another service.
        """
        scheme, _, place = os.fspath(path).partition("://")
        if scheme != "gs":
            raise ValueError(
                f"{path}: a run writes to a disk or to gs://; use another "
                "--workdir"
            )
        bucket, _, self._name = place.partition("/")
        self._bucket = _client().bucket(bucket)
        self._path, self._create = path, create
        self._blob: Any = None

    def read(self) -> bytes:
        """Return what it holds; b"" where it is still to be created.

        Raises:
          FileNotFoundError: where it does not exist.
        """
        from google.api_core.exceptions import NotFound

        options = _patience()
        self._blob = self._bucket.get_blob(self._name, **options)
        if self._blob is None:
            if self._create:
                return b""
            raise FileNotFoundError(str(self._path))
        try:
            return self._blob.download_as_bytes(**options)
        except NotFound:  # replaced since
            return self.read()

    def write(self, data: bytes) -> bool:
        """Replace what was read last; return False if it has changed."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        before = 0 if self._blob is None else self._blob.generation
        try:
            blob.upload_from_string(
                data, if_generation_match=before, **_patience()
            )
        except PreconditionFailed:
            return False
        return True

    def remove(self) -> None:
        """Remove what was read last, if it has not changed."""
        self._blob.delete(
            if_generation_match=self._blob.generation, **_patience()
        )


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _patience() -> dict[str, Any]:
    """Return how long a lock waits for a bucket."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"retry": DEFAULT_RETRY.with_timeout(_RETRY_SECONDS)}


def _system(path: Any) -> tuple[Any, str]:
    """Return the client of a bucket, and the path as it spells it."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))


def _listing(path: Any) -> dict[str, str]:
    """Return file below a path ("" for itself) -> what changes with it."""
    system, root = _system(path)
    found = system.find(root, detail=True)
    return {
        name.removeprefix(root).strip("/"): str(
            about.get("etag") or about.get("mtime") or about["size"]
        )
        for name, about in found.items()
    }
