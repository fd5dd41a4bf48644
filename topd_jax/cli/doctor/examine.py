"""All checks of the preflight, in two stages: files, then models."""

import pathlib
from collections.abc import Callable, Iterable

import jax

from topd_jax.cli.doctor import batch, fit, tokens
from topd_jax.cli.doctor.files import Context, gather, uses_world
from topd_jax.cli.doctor.findings import (
    Finding,
    attempt,
    errors,
    report,
    require,
)
from topd_jax.cli.doctor.kernels import kernels
from topd_jax.data.toy_world.models import comes_trained
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup, load_setup

# What files say, in the order of the report.
FILE_CHECKS: tuple[Callable[[Context], Iterable[Finding]], ...] = (
    tokens.vocabularies,
    tokens.templates,
    tokens.beginning,
    tokens.prompt_lengths,
    tokens.teacher_prompts,
    tokens.ends,
    fit.dtypes,
    fit.repeatable,
    fit.meshes,
    fit.slices,
)


def examine_files(settings: Settings, workdir: pathlib.Path) -> list[Finding]:
    """Check everything that can be seen without reading a weight.

    Args:
      settings: of the run.
      workdir: where the tiny world's models are trained.

    Returns:
      The findings; errors are collected, not raised.
    """
    findings, context = gather(settings, workdir)
    if context is not None:
        for check in FILE_CHECKS:
            findings += check(context)
    return findings


def examine_setup(settings: Settings, setup: Setup) -> list[Finding]:
    """Check what the models do with one small batch for each teacher.

    Args:
      settings: of the run.
      setup: of the run, before anything is trained; every process must call
        this, for its programs run on the whole mesh.

    Returns:
      The findings.
    """
    models = {"student": setup.student} | {
        f"teacher {t.name}".strip(): t.model
        for t in setup.teachers
        if t.model is not None
    }
    findings = [*kernels(models)]
    if errors(findings):
        return findings
    for teacher in setup.teachers:
        with jax.set_mesh(setup.mesh):
            scores = batch.score(settings, setup, teacher)
        where = f" ({teacher.name})" if teacher.name else ""
        findings += batch.judged(scores, where, offline=settings.is_offline)
    return findings


def examine(
    settings: Settings, workdir: pathlib.Path
) -> tuple[list[Finding], Setup | None]:
    """Run both stages; the second only where the first has no error.

    Args:
      settings: of the run.
      workdir: of the run, where a tiny world's models are trained.

    Returns:
      (the findings, in the order of the report; the setup of the run, None
      where it was not loaded).
    """
    findings = examine_files(settings, workdir)
    if errors(findings):
        return findings, None
    setup = attempt(findings, "loading", load_setup, settings, workdir)
    if setup is not None:
        findings += examine_setup(settings, setup)
    return findings, setup


def doctor(settings: Settings, workdir: pathlib.Path | None) -> None:
    """Check a run and print the report (``topd doctor``).

    Args:
      settings: of the run.
      workdir: see :func:`examine`; None where nothing is trained.

    Raises:
      ValueError: where a tiny world is to be trained and has no place.
      SystemExit: with 2 where there is an error, else with 0.
    """
    has_place = workdir or settings.world.cache or comes_trained(settings.world)
    if uses_world(settings) and not has_place:
        raise ValueError(
            "the models of this tiny world are trained before they are "
            "checked; say where by --workdir DIR"
        )
    findings, _ = examine(settings, workdir or pathlib.Path())
    if hosts.is_first():
        print(report(findings))
    raise SystemExit(2 if errors(findings) else 0)


def preflight(settings: Settings, workdir: pathlib.Path) -> Setup:
    """Check a run before it begins; every process must call this.

    Args:
      settings: of the run.
      workdir: of the run.

    Returns:
      The setup of the run, loaded.

    Raises:
      ValueError: naming every error with its way out.
    """
    findings, setup = examine(settings, workdir)
    require(findings)
    return setup
