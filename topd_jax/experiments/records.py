"""Records of finished runs: JSON lines that a killed process can continue."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

from topd_jax.training.logging import read_jsonl


def machine() -> str:
    """Return processor, cores, devices and JAX version as text."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s), "
        f"jax {jax.__version__}"
    )


def append_row(record: pathlib.Path, row: dict[str, Any]) -> None:
    """Append a line: the record has all of it on disk, or nothing.

    Args:
      record: a JSONL file; it may not exist yet.
      row: JSON-able.
    """
    fresh = record.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        for line in (*read_jsonl(record), row):
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(record)
