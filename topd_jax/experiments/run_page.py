"""One HTML page of what runs left in their work directories (``topd report``).

Curves, evaluations, speed, answers to the same problems over time, and the
settings that differ. A run that still goes on, or lacks parts, has a page too.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from topd_jax.experiments import pages
from topd_jax.experiments.run_curves import curves_of, tables_of
from topd_jax.models.io.runs import SETTINGS
from topd_jax.training.config import defaults_of
from topd_jax.training.logging import read_jsonl
from topd_jax.training.sections import flat

Row = Mapping[str, Any]
_BENCHMARKED = ("latest", "best", "start")


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What a run left behind; every part may be empty.

    Attributes:
      name: of its work directory.
      settings: what ``Settings.to_dict`` gave.
      metrics: lines of ``metrics.jsonl``.
      evals: lines of ``evals.jsonl``.
      completions: lines of ``completions.jsonl``.
      problems: lines of ``problems.jsonl``.
      benchmarks: "latest", "best" or "start" -> its ``eval-WHICH.json``.
    """

    name: str
    settings: Row = dataclasses.field(default_factory=dict)
    metrics: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    completions: Sequence[Row] = ()
    problems: Sequence[Row] = ()
    benchmarks: Mapping[str, Row] = dataclasses.field(default_factory=dict)


def read_run(workdir: pathlib.Path) -> RunRecords:
    """Reads a work directory of ``topd train``, finished or not.

    Args:
      workdir: the directory.

    Returns:
      Its records; a last line that is only half written is passed over.

    Raises:
      ValueError: where there is no run, or a file is not what a run writes.
    """
    if not workdir.is_dir():
        raise ValueError(
            f"no directory at {workdir}; give the --workdir of topd train"
        )
    logs = {
        name: _read_log(workdir / f"{name}.jsonl")
        for name in ("metrics", "evals", "completions", "problems")
    }
    path = workdir / SETTINGS
    if not path.is_file() and not any(logs.values()):
        below = sorted(p.parent.name for p in workdir.glob(f"*/{SETTINGS}"))
        raise ValueError(
            f"{workdir} holds no run: neither {SETTINGS} nor metrics.jsonl; "
            + (
                f"there are runs below it: {', '.join(below)}"
                if below
                else "topd train writes them"
            )
        )
    return RunRecords(
        name=workdir.resolve().name,
        settings=_read_json(path),
        benchmarks={
            which: found
            for which in _BENCHMARKED
            if (found := _read_json(workdir / f"eval-{which}.json"))
        },
        **logs,
    )


def _read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path, torn=True)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(
                f"{path}: record {number} has no step; topd train writes one "
                "on every line: remove the line"
            )
    return rows


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); remove it, or write it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; remove it")
    return found


def page_data(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """What the page's script reads.

    Args:
      runs: one, or several to lay over each other; names differ.

    Returns:
      JSON-able, without NaN: "runs", their names; "curves", "thinned" and
      "tables" as in :mod:`topd_jax.experiments.run_curves`; "problems", each
      with its answers; "completions" of training; "settings", each with the
      value of every run, the default and whether it "differs".
    """
    curves, thinned = curves_of(runs)
    return {
        "runs": [run.name for run in runs],
        "curves": curves,
        "thinned": thinned,
        "tables": tables_of(runs),
        "problems": _problems_of(runs),
        "completions": [
            {
                "run": place,
                "step": row["step"],
                "teacher": row.get("teacher", ""),
                "prompt": str(row.get("prompt", "")),
                "completion": str(row.get("completion", "")),
                "truncated": bool(row.get("truncated")),
            }
            for place, run in enumerate(runs)
            for row in sorted(run.completions, key=lambda r: r["step"])
        ],
        "settings": _settings_of(runs),
    }


def _problems_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Problems in the order in which they were asked, answers by step."""
    found: dict[tuple, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for row in sorted(run.problems, key=lambda r: r["step"]):
            problem = str(row.get("problem", ""))
            final, answer = bool(row.get("final")), str(row.get("answer", ""))
            entry = found.setdefault(
                (final, problem, answer),
                {"problem": problem, "answer": answer, "final": final}
                | {"answers": []},
            )
            entry["answers"].append(
                {
                    "run": place,
                    "step": row["step"],
                    "completion": str(row.get("completion", "")),
                    "right": row.get("right"),
                    "truncated": bool(row.get("truncated")),
                }
            )
    return sorted(found.values(), key=lambda entry: entry["final"])


def _settings_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    own = [flat(run.settings) for run in runs]
    defaults = {}
    for run in runs:
        defaults |= defaults_of(run.settings)
    rows = []
    for name in dict.fromkeys(key for values in own for key in values):
        # A section's source and the seed have no default to keep.
        default = defaults.get(name)
        values = [mine.get(name) for mine in own]
        known = name in defaults
        rows.append(
            {
                "name": name,
                "values": [
                    _text(v) if name in mine else "–"
                    for v, mine in zip(values, own, strict=True)
                ],
                "default": _text(default) if known else "–",
                "differs": not known or any(v != default for v in values),
            }
        )
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def facts_of(runs: Sequence[RunRecords]) -> dict[str, str]:
    """What stands at the top of the page.

    Args:
      runs: of the page.

    Returns:
      name -> text: the only run's variant, models and state, or the names of
      several and their states.
    """
    if len(runs) > 1:
        return {run.name: _state(run) for run in runs}
    (run,) = runs
    known = flat(run.settings)
    facts = {"run": run.name}
    for fact, setting in (
        ("variant", "objective.variant"),
        ("student", "student.source"),
        ("teacher", "teacher.source"),
        ("seed", "seed"),
    ):
        if setting in known:
            facts[fact] = str(known[setting])
    return facts | {"state": _state(run)}


def _state(run: RunRecords) -> str:
    at = max((r["step"] for r in (*run.metrics, *run.evals)), default=0)
    steps = flat(run.settings).get("train.steps")
    made = f"step {at}" + (f" of {steps}" if steps else "")
    ends = [r for r in run.evals if r.get("final")]
    if not ends:
        return f"{made}, not finished"
    right = ends[-1].get("exact_match")
    if not isinstance(right, int | float):
        return f"{made}, finished"
    return f"{made}, finished with {100 * right:.1f} % right"


def write_page(runs: Sequence[RunRecords], path: pathlib.Path) -> None:
    """Writes the page.

    Args:
      runs: one, or several to lay over each other.
      path: of the HTML file.
    """
    names = ", ".join(run.name for run in runs)
    pages.write(
        "run.html", page_data(runs), path,
        title=f"{'Runs' if len(runs) > 1 else 'Run'} {names}",
        facts=facts_of(runs),
    )  # fmt: skip


def report(
    workdirs: Iterable[pathlib.Path], output: pathlib.Path | None
) -> dict[str, Any]:
    """Reads runs and writes their page.

    Args:
      workdirs: of the runs, the first one's first.
      output: the HTML file; None is ``report.html`` in the first.

    Returns:
      "page", its path; "runs" and "step", how far each of them is.

    Raises:
      ValueError: where there is no run, or the same one twice.
    """
    workdirs = [pathlib.Path(d) for d in workdirs]
    runs = [read_run(d) for d in workdirs]
    places = [d.resolve() for d in workdirs]
    if len(set(places)) < len(places):
        raise ValueError(
            f"the same run is given twice: {', '.join(map(str, workdirs))}"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # a/run and b/run
        runs = [
            dataclasses.replace(run, name=f"{place.parent.name}/{run.name}")
            for run, place in zip(runs, places, strict=True)
        ]
    page = output or workdirs[0] / "report.html"
    write_page(runs, page)
    return {
        "page": str(page),
        "runs": {run.name: _state(run) for run in runs},
    }
