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
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from topd_jax.experiments.detectors import measure_forks
from topd_jax.experiments.records import append_row, machine
from topd_jax.experiments.sweep_report import write_report
from topd_jax.parallel import buckets, hosts, lock
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import Run, require_solutions
from topd_jax.training.recovery import say
from topd_jax.training.setup import Setup, load_setup

# What the runs of a sweep may differ in: models and problems are shared.
_SECTIONS = ("offline", "optimizer", "rollout", "train")


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
    runs = {(run.name, run.mark): run for run in _runs(settings)}
    record = workdir / "record.jsonl"
    with lock.held(workdir):
        rows = hosts.from_first(lambda: read_jsonl(record))
        recorded = {_key(row) for row in rows}
        missing = {key: run for key, run in runs.items() if key not in recorded}
        for run in missing.values():
            require_solutions(run.settings)
        setups: dict[str, Setup] = {}
        started = time.monotonic()
        for done, run in enumerate(missing.values()):
            if run.world not in setups:
                setups[run.world] = load_setup(run.settings, workdir)
            if not done:  # what is refused is one line
                say(tqdm, f"{record} holds {len(runs) - len(missing)} of "
                    f"{len(runs)} runs")  # fmt: skip
            row = _measure(run, workdir, setups[run.world])
            if hosts.is_first():
                append_row(record, row)
                # So that there is something to look at meanwhile.
                files = write_report(_rows(record, runs), workdir / "report")
                left, last = len(missing) - done - 1, list(files.values())[-1]
                minutes = (time.monotonic() - started) / (done + 1) / 60 * left
                say(tqdm, f"{run.name} done; about {minutes:.0f} min for the "
                    f"other {left}; see {last}")  # fmt: skip
        return hosts.from_first(lambda: _report(record, runs, workdir))


def _report(
    record: pathlib.Path,
    runs: Mapping[tuple[str, str], "_Run"],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    files = write_report(_rows(record, runs), workdir / "report")
    print(buckets.as_path(files["table_file"]).read_text(), flush=True)
    return files


def _rows(
    record: pathlib.Path, runs: Mapping[tuple[str, str], "_Run"]
) -> list[dict[str, Any]]:
    """Return the lines of some runs, of worlds as these spell them."""
    return [
        row | {"world": runs[_key(row)].world}
        for row in read_jsonl(record)
        if _key(row) in runs
    ]


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["name"], row["fingerprint"]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run of a sweep, before it is made."""

    name: str
    world: str
    settings: Settings

    @property
    def mark(self) -> str:
        """Return a fingerprint, without paths and intervals of writing."""
        settings = self.settings
        plain = {
            name: type(getattr(settings, name))()
            for name in ("sweep", "log", "checkpoint")
        }
        world = dataclasses.replace(settings.world, cache="")
        return dataclasses.replace(settings, world=world, **plain).fingerprint()

    @property
    def folder(self) -> str:
        """Return the name of its directory, of at most 250 letters."""
        name = f"{self.world}-{self.name}-{self.settings.seed}".strip("-")
        name = re.sub(r"[^\w.]+", "-", name)[:240]
        # A run goes on with another rate or length; that is another run.
        return f"{name}-{self.mark[:8]}"


def _runs(settings: Settings) -> Iterator[_Run]:
    """Yield each run, seed by seed and world by world."""
    for seed in settings.sweep.seeds:
        for world in settings.sweep.worlds or ("",):
            where = f"sweep.worlds: {world!r}"
            at = _changed(settings, where, world, ("world",))
            at = dataclasses.replace(at, seed=seed)
            yield _Run("start", world, at)
            if not settings.teachers:
                yield _Run("teacher", world, at)
            for name in settings.sweep.variants:
                yield _Run(name, world, with_variant(at, name))


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
    objective, _, changes = entry.partition(";")
    where = f"sweep.variants: {entry!r}"
    return _changed(
        settings, where, changes, _SECTIONS, objective=objective.strip()
    )


def _changed(
    settings: Settings,
    where: str,
    changes: str,
    sections: Sequence[str],
    **top: str,
) -> Settings:
    """Return settings with "section.key=value;..." and what ``top`` sets."""
    tree = settings.to_dict() | top
    try:
        for change in filter(None, map(str.strip, changes.split(";"))):
            name, equals, value = map(str.strip, change.partition("="))
            section, _, key = name.partition(".")
            if section not in sections or not equals:
                raise ValueError(
                    f"{change!r} must be section.key=value, the section one "
                    f"of {', '.join(sections)}; all else is shared"
                )
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            tree[section][key] = value
        return settings_from(tree)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _measure(run: _Run, workdir: pathlib.Path, setup: Setup) -> dict[str, Any]:
    """Train and evaluate one run; return its line of the record."""
    name, settings = run.name, run.settings
    row: dict[str, Any] = {
        "name": name,
        "world": run.world,
        "seed": settings.seed,
        "fingerprint": run.mark,
        "machine": machine(),
    }
    if name == "teacher":  # it writes after what it reads
        setup = dataclasses.replace(setup, test=setup.test.for_teacher)
    evaluate = functools.partial(
        setup.evaluator(settings).evaluate,
        step=settings.train.steps,
        final=True,
    )
    with jax.set_mesh(setup.mesh):
        if name in ("start", "teacher"):
            model = setup.student
            if name == "teacher":
                model = setup.teachers[0].beside(model)
            elif settings.data.source == "world":
                row |= measure_forks(settings, setup)
            row["evaluation"], _ = evaluate(model)
        else:
            folder = workdir / "runs" / run.folder
            with lock.held(folder):
                training = Run(settings, folder, setup)
                row["evaluation"] = training.train()
            model = training.student
            row |= hosts.from_first(lambda: _summarize_logs(folder))
        row["greedy"], _ = evaluate(model, temperature=0.0)
    return row


def _summarize_logs(folder: pathlib.Path) -> dict[str, Any]:
    """Return seconds and the learning curve of a run."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    kinds = (
        [m["seconds"] for m in metrics if ("guidance" in m) is guided]
        for guided in (True, False)
    )
    # Guided steps and others; a median ignores those that compile.
    seconds = sum(len(k) * statistics.median(k) for k in kinds if k)
    return {
        "seconds_step": seconds / len(metrics) if metrics else None,
        "curve": [
            {name: e[name] for name in ("step", "exact_match", "reverse_kl")}
            for e in read_jsonl(folder / "evals.jsonl")
            if not e["final"]
        ],
    }
