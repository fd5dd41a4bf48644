"""Checksums of a checkpoint's files, written before it is committed.

orbax does not notice a flipped byte in an array. ``SHA256SUMS`` is in the
checkpoint's directory, in the format of coreutils: ``sha256sum --check
SHA256SUMS`` verifies a checkpoint too. Two files of orbax beside it are written
later and have no checksum; restoring does not depend on them.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from topd_jax.parallel import buckets

NAME = "SHA256SUMS"
# The items of a checkpoint: folders of its directory.
STATE, RECORD = "state", "record"
_THREADS = 8  # files read at a time


def write_checksums(directory: Path) -> None:
    """Write the checksums of every file of a checkpoint.

    Args:
      directory: of one step, before it gets its final name.
    """
    hashes = _hashes(directory, _files(directory, (STATE, RECORD)))
    lines = (f"{digest}  {name}\n" for name, digest in hashes.items())
    (directory / NAME).write_text("".join(lines))


def find_damage(
    directory: Path, items: Iterable[str] = (STATE, RECORD)
) -> str | None:
    """Compare the files of a checkpoint with their checksums.

    Args:
      directory: of one step.
      items: whose files are read.

    Returns:
      A file that is missing, unexpected or different, and which of these it
      is; None if there is no such file.
    """
    if not (directory / NAME).is_file():
        return f"{NAME} is missing"
    text = (directory / NAME).read_bytes().decode(errors="replace")
    lines = (line.partition("  ") for line in text.splitlines())
    known = {name: digest for digest, _, name in lines}
    items = tuple(items)
    wanted = {name for name in known if name.startswith(items)}
    there = set(_files(directory, items))
    for name in sorted(wanted ^ there):
        return f"{name} is {'missing' if name in wanted else f'not in {NAME}'}"
    for name, digest in _hashes(directory, sorted(there)).items():
        if digest != known[name]:
            return f"{name} differs from its checksum in {NAME}"
    return None


def require_intact(
    directory: Path, out: str, items: Iterable[str] = (STATE, RECORD)
) -> None:
    """Refuse a damaged checkpoint.

    Args:
      directory: of one step.
      out: the way out, for the error.
      items: whose files are read.

    Raises:
      ValueError: naming the file, what is wrong with it, and the way out.
    """
    damage = find_damage(directory, items)
    if damage:
        raise ValueError(
            f"the checkpoint {directory} is damaged: {damage}; {out}"
        )


def _files(directory: Path, items: Iterable[str]) -> list[str]:
    return sorted(
        f"{item}/{name}"
        for item in items
        for name in buckets.files(directory / item)
    )


def _hashes(directory: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
