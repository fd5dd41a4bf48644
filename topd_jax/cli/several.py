"""A command that runs as several processes: join them, all of them alike."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from topd_jax.cli.commands import Command
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings

_PACKAGE = pathlib.Path(__file__).parents[1]


def join(
    name: str,
    command: Command,
    values: dict[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """Join the other processes of a command, where its flags name any.

    Args:
      name: of the command.
      command: what it is.
      values: of its flags, the config left out.
      settings: of the run.

    Returns:
      The values without those that say how to join.

    Raises:
      ValueError: for flags that do not go together, or a process of another
        version, command or config.
    """
    several = [values.pop(n) for n in ("coordinator", "processes", "process")]
    if values.pop("distributed") or several != [None, None, None]:
        hosts.start(
            *several,
            heartbeat_seconds=settings.train.heartbeat,
            in_steps=command.in_steps,
        )
        hosts.require_same(_facts(name, values, settings))
    return values


def _facts(
    name: str, values: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """Return what must be the same in every process of one program."""
    return {
        "files of topd_jax": code_fingerprint(),
        "jax": jax.__version__,
        "command": name,
        **{f"--{flag}": str(value) for flag, value in values.items()},
        **flatten_dict({"config": settings.to_dict()}, sep="."),
    }


def code_fingerprint() -> str:
    """Return eight hex digits of the package's files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
