"""``topd report``: a page of a run, or of several beside each other."""

import pathlib
from typing import Any

from topd_jax.experiments import run_page


def report(
    workdir: pathlib.Path,
    b: list[pathlib.Path],
    output: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Write a page of a run, or of several beside each other.

    Args:
      workdir: of the run.
      b: of further runs.
      output: the HTML file; None is ``report.html`` in ``workdir``.

    Returns:
      "page", its path, and how far each of the "runs" is.
    """
    return run_page.report([workdir, *b], output)
