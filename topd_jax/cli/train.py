"""``topd train``: the preflight, then the run."""

import pathlib
from typing import Any

from topd_jax.cli.doctor.examine import preflight
from topd_jax.parallel import hosts, lock
from topd_jax.training import checkpointing, loop
from topd_jax.training.config import Settings


def train(
    settings: Settings,
    workdir: pathlib.Path,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> dict[str, Any]:
    """Train a student, or resume; the preflight comes before a fresh run.

    Args:
      settings: of the run.
      workdir: of the run.
      distributed: whether this is one of several processes that JAX finds.
      coordinator: "HOST:PORT" of the first of several processes.
      processes: how many there are.
      process: which of them this is, from 0.

    Returns:
      The final evaluation.

    Raises:
      ValueError: for what the preflight finds, among others.
    """
    several = (coordinator, processes, process)
    if distributed or several != (None, None, None):
        hosts.start(*several, heartbeat_seconds=settings.train.heartbeat)
    with lock.held(workdir):
        # A run that resumes has passed it.
        fresh = not checkpointing.has_steps(workdir / "checkpoints")
        setup = None
        if settings.train.preflight and fresh:
            setup = preflight(settings, workdir)
        return loop.train(settings, workdir, setup=setup)
