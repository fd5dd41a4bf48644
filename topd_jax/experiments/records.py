"""Records of finished runs: JSON lines that a killed process can continue."""

import json
import os
import pathlib
import platform
from typing import Any

import jax


def machine() -> str:
    """Return processor, cores, devices and JAX version as text."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s), "
        f"jax {jax.__version__}"
    )


def append_row(record: pathlib.Path, row: dict[str, Any]) -> None:
    """Append a line and wait until it is on disk.

    Args:
      record: a JSONL file; it may not exist yet.
      row: JSON-able.
    """
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_partial_line(record: pathlib.Path) -> None:
    """Drop a last line that was cut off while it was written.

    A last line that lacks only its newline gets one.

    Args:
      record: a JSONL file; it may not exist yet.
    """
    if not record.exists():
        return
    content = record.read_bytes()
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        os.truncate(record, end)
    else:
        record.write_bytes(content + b"\n")
