"""The preflight of a run: warnings are logged, errors stop it (ours)."""

import pathlib
from collections.abc import Sequence

from absl import logging

from topd_jax.cli.doctor.examine import examine_files, examine_pair
from topd_jax.cli.doctor.findings import Finding, require
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings
from topd_jax.training.setup import Pair


def check_files(settings: Settings, workdir: pathlib.Path) -> None:
    """The first stage, before a weight is read.

    Args:
      settings: of the run.
      workdir: of the run.

    Raises:
      ValueError: naming every error with its way out.
    """
    _report(examine_files(settings, workdir))


def check_pair(settings: Settings, pair: Pair) -> None:
    """The second stage, with the models; all processes must call it.

    Args:
      settings: of the run.
      pair: of the run.

    Raises:
      ValueError: naming every error with its way out.
    """
    _report(examine_pair(settings, pair))


def _report(findings: Sequence[Finding]) -> None:
    if hosts.is_first():
        for f in findings:
            if f.level == "warning":
                logging.warning(
                    "preflight: %s: %s -> %s", f.name, f.text, f.way_out
                )
    require(findings)
