"""Records of finished runs: JSON lines that a killed process can continue."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

from topd_jax.parallel import buckets
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
    lines = (json.dumps(line) + "\n" for line in (*read_jsonl(record), row))
    buckets.write_whole(record, "".join(lines))
