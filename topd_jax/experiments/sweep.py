"""``topd sweep``: every objective on every seed, resumable run by run.

Each finished run appends one JSON line to a record, with the fingerprint of
its settings. A run that the record holds is not repeated, and a run that was
killed continues from its checkpoint.
"""

import dataclasses
import functools
import pathlib
import re
import statistics
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from topd_jax.experiments.detectors import measure_detectors
from topd_jax.experiments.records import (
    append_row,
    drop_partial_line,
    machine,
)
from topd_jax.experiments.sweep_report import write_report
from topd_jax.experiments.variants import with_variant
from topd_jax.training.config import Settings
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import Run
from topd_jax.training.setup import Setup, load_setup


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
    runs = list(_runs(settings))  # check all of them before the first starts
    record = pathlib.Path(settings.sweep.record or workdir / "record.jsonl")
    record.parent.mkdir(parents=True, exist_ok=True)
    drop_partial_line(record)
    recorded = {(r["name"], r["fingerprint"]) for r in read_jsonl(record)}
    missing = [
        (name, run) for name, run in runs if (name, _mark(run)) not in recorded
    ]
    logging.info("%s holds %d of %d runs", record, len(runs) - len(missing),
                 len(runs))  # fmt: skip
    family = _mark(dataclasses.replace(settings, seed=0))
    if missing:
        setup = load_setup(settings, workdir)
    for name, run in missing:
        row = _run(name, run, workdir, setup)
        append_row(record, row | {"config": family})
    rows = [r for r in read_jsonl(record) if r["config"] == family]
    return write_report(rows, workdir / "report")


def _runs(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield each run's name and settings, seed by seed."""
    for seed in settings.sweep.seeds:
        at_seed = dataclasses.replace(settings, seed=seed)
        yield "start", at_seed
        if not settings.teachers:
            yield "teacher", at_seed
        for name in settings.sweep.variants:
            yield name, with_variant(at_seed, name)


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
            run = Run(settings, workdir / "runs" / folder, setup)
            row["evaluation"] = run.train()
            model = run.student
            row |= _summarize_logs(run.workdir)
        greedy, _ = evaluate(model, temperature=0.0)
    row["greedy"] = {
        k: v for k, v in greedy.items() if k.startswith(("exact", "grad"))
    }
    return row


def _summarize_logs(folder: pathlib.Path) -> dict[str, Any]:
    """Return steps, tokens, seconds and the learning curve of a run."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    tokens = {0: 0.0}
    for m in metrics:
        tokens[m["step"]] = tokens[m["step"] - 1] + m["num_tokens"]
    steps = metrics[-1]["step"]
    return {
        "steps": steps,
        "tokens": tokens[steps],
        # The median ignores the steps that compile.
        "seconds_step": statistics.median(m["seconds"] for m in metrics),
        "curve": [
            {"step": e["step"], "tokens": tokens[e["step"]]}
            | {name: e[name] for name in ("exact_match", "reverse_kl")}
            for e in read_jsonl(folder / "evals.jsonl")
            if not e["final"]
        ],
    }
