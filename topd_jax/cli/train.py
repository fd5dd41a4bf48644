"""``topd train``: the preflight, then the run."""

import logging
import os
import pathlib
import sys
from typing import Any

from absl.logging import get_absl_logger

from topd_jax.cli.doctor.examine import preflight
from topd_jax.models.io import runs
from topd_jax.parallel import lock
from topd_jax.training import loop
from topd_jax.training.config import Settings


def train(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Train a student, or resume; the preflight comes before a fresh run.

    Args:
      settings: of the run.
      workdir: of the run.

    Returns:
      The final evaluation.

    Raises:
      ValueError: for what the preflight finds, among others.
    """
    if not os.environ.get("TOPD_TRACEBACK"):
        _tell_failed_saves_once()
    with lock.held(workdir):
        # A run that resumes has passed it.
        resumes = runs.steps(workdir / runs.LATEST)
        setup = None
        if settings.train.preflight and not resumes:
            setup = preflight(settings, workdir)
        return loop.train(settings, workdir, setup=setup)


def _tell_failed_saves_once() -> None:
    """Silence orbax about errors of the background that it raises later.

    It logs each up to three times with a traceback; and once the first write
    has failed, every other failed one ends in an event loop that is closed.
    """
    get_absl_logger().addFilter(_is_news)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    plain = sys.unraisablehook
    sys.unraisablehook = lambda failed: (
        None
        if "Event loop is closed" in str(failed.exc_value)
        else plain(failed)
    )


def _is_news(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or not record.exc_info
