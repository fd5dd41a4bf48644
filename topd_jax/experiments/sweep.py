"""``topd sweep``: every objective on every seed, resumable run by run.

Each finished run appends one JSON line to a record, with the fingerprint of
its settings. A run that the record holds is not repeated, and a run that was
killed continues from its checkpoint.
"""

import ast
import contextlib
import dataclasses
import functools
import pathlib
import re
import statistics
from collections.abc import Container, Iterator
from typing import Any

import jax
from absl import logging

from topd_jax.experiments.detectors import measure_detectors
from topd_jax.experiments.records import append_row, machine
from topd_jax.experiments.sweep_report import write_report
from topd_jax.parallel import hosts, lock
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import Run
from topd_jax.training.setup import Setup, load_setup

# What the runs of a sweep may differ in: models and problems are shared.
_SECTIONS = ("offline", "optimizer", "rollout", "train")
# Of a line of the record: the run that it is of, and what was found.
_FIELDS = {
    "name": str, "fingerprint": str, "seed": int, "machine": str,
    "evaluation": dict, "greedy": dict,
}  # fmt: skip


def sweep(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Run what ``settings.sweep`` names and write tables and pictures.

    Args:
      settings: of every run, except for what a variant changes and the seed;
        detectors look as far ahead as ``settings.objective``.
      workdir: of the sweep; runs in ``workdir/runs``.

    Returns:
      Where the report's files are.

    Raises:
      ValueError: for a variant that cannot be trained.
    """
    cache = settings.world.cache or str(workdir / "world")
    world = dataclasses.replace(settings.world, cache=cache)
    settings = dataclasses.replace(settings, world=world)
    # All of them are checked before the first one starts.
    runs = {(name, _mark(run)): run for name, run in _runs(settings)}
    record = workdir / "record.jsonl"
    with lock.held(workdir):
        rows = hosts.from_first(lambda: read_jsonl(record, fields=_FIELDS))
        recorded = {_key(row) for row in rows}
        missing = {key: run for key, run in runs.items() if key not in recorded}
        logging.info("%s holds %d of %d runs", record, len(runs) - len(missing),
                     len(runs))  # fmt: skip
        if missing:
            setup = load_setup(settings, workdir)
        for (name, _), run in missing.items():
            row = _run(name, run, workdir, setup)
            if hosts.is_first():
                append_row(record, row)
                # So that there is something to look at meanwhile.
                files = write_report(_rows(record, runs), workdir / "report")
                logging.info("%s done; see %s", name, list(files.values())[-1])
        return hosts.from_first(lambda: _report(record, runs, workdir))


def _report(
    record: pathlib.Path,
    runs: Container[tuple[str, str]],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    files = write_report(_rows(record, runs), workdir / "report")
    print(pathlib.Path(files["table_file"]).read_text(), flush=True)
    return files


def _rows(
    record: pathlib.Path, runs: Container[tuple[str, str]]
) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(record) if _key(row) in runs]


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["name"], row["fingerprint"]


def _runs(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield each run's name and settings, seed by seed."""
    for seed in settings.sweep.seeds:
        at_seed = dataclasses.replace(settings, seed=seed)
        yield "start", at_seed
        if not settings.teachers:
            yield "teacher", at_seed
        for name in settings.sweep.variants:
            yield name, with_variant(at_seed, name)


def with_variant(settings: Settings, entry: str) -> Settings:
    """Return the settings that an entry of ``sweep.variants`` asks for.

    Args:
      settings: of the sweep.
      entry: an objective as in ``config.objective``, then any number of
        ";section.key=value", such as "opd;train.steps=450".

    Returns:
      The settings of that run.

    Raises:
      ValueError: for an unknown objective, option or key, a key that all runs
        of a sweep share, or a value out of bounds.
    """
    objective, *changes = map(str.strip, entry.split(";"))
    tree = settings.to_dict() | {"objective": objective}
    try:
        for change in changes:
            name, equals, value = map(str.strip, change.partition("="))
            section, _, key = name.partition(".")
            if section not in _SECTIONS or not equals:
                raise ValueError(
                    f"{change!r} must be section.key=value, the section one "
                    f"of {', '.join(_SECTIONS)}; all else is shared"
                )
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            tree[section][key] = value
        return settings_from(tree)
    except ValueError as error:
        raise ValueError(f"sweep.variants: {entry!r}: {error}") from error


def _mark(settings: Settings) -> str:
    """Return a run's fingerprint, without paths and intervals of writing."""
    plain = {
        name: type(getattr(settings, name))()
        for name in ("sweep", "log", "checkpoint")
    }
    world = dataclasses.replace(settings.world, cache="")
    return dataclasses.replace(settings, world=world, **plain).fingerprint()


def _run(
    name: str, settings: Settings, workdir: pathlib.Path, setup: Setup
) -> dict[str, Any]:
    """Train and evaluate one run; return its line of the record."""
    row: dict[str, Any] = {
        "name": name,
        "seed": settings.seed,
        "fingerprint": _mark(settings),
        "machine": machine(),
    }
    evaluate = functools.partial(
        setup.evaluator(settings).evaluate,
        step=settings.train.steps,
        final=True,
    )
    with jax.set_mesh(setup.mesh):
        if name in ("start", "teacher"):
            model = setup.student
            if name == "teacher":
                model = setup.teachers[0].model
            elif settings.data.source == "world":
                row["detector"] = measure_detectors(settings, setup)
            row["evaluation"], _ = evaluate(model)
        else:
            folder = re.sub(r"[^\w.]+", "-", f"{name}-{settings.seed}")
            folder = workdir / "runs" / folder
            with lock.held(folder):
                run = Run(settings, folder, setup)
                row["evaluation"] = run.train()
            model = run.student
            row |= hosts.from_first(lambda: _summarize_logs(folder))
        row["greedy"], _ = evaluate(model, temperature=0.0)
    return row


def _summarize_logs(folder: pathlib.Path) -> dict[str, Any]:
    """Return seconds and the learning curve of a run."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    return {
        # The median ignores the steps that compile.
        "seconds_step": statistics.median(m["seconds"] for m in metrics),
        "curve": [
            {name: e[name] for name in ("step", "exact_match", "reverse_kl")}
            for e in read_jsonl(folder / "evals.jsonl")
            if not e["final"]
        ],
    }
