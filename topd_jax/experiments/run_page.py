"""One HTML page of what runs left in their work directories (``topd report``).

Curves, evaluations, answers to the same problems over time, and the
settings that differ. A run that still goes on, or lacks parts, has a page too.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from plotly.offline import get_plotlyjs

from topd_jax.experiments import pages, run_curves
from topd_jax.experiments.run_records import Row, RunRecords, read_run
from topd_jax.parallel import buckets
from topd_jax.training.config import defaults_of

_EVALUATED = {
    "exact_match": "right",
    "problems": "problems",
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "student_entropy": "entropy",
    "length_mean": "length",
    "truncated": "cut off",
    "distinct_3": "distinct 3-grams",
}


def write_page(runs: Sequence[RunRecords], path: pathlib.Path) -> None:
    """Write the page of runs.

    Args:
      runs: one, or several to lay over each other; their names differ.
      path: of the HTML file.
    """
    pages.write(
        "run.html", path,
        title=f"{'Runs' if len(runs) > 1 else 'Run'} "
        + ", ".join(run.name for run in runs),
        facts={run.name: state_of(run) for run in runs},
        runs=[run.name for run in runs],
        plotly=get_plotlyjs(),
        charts=run_curves.curves_of(runs),
        html_of=run_curves.html_of,
        summary_of=run_curves.summary_of,
        tables=tables_of(runs),
        problems=problems_of(runs),
        completions=[
            {"run": run.name, **row}
            for run in runs
            for row in sorted(run.completions, key=lambda r: r["step"])
        ],
        settings=settings_of(runs),
    )  # fmt: skip


def report(
    workdir: pathlib.Path,
    b: Sequence[pathlib.Path] = (),
    output: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Write a page of a run, or of several beside each other.

    Args:
      workdir: of the run.
      b: of further runs.
      output: the HTML file; None is ``report.html`` in ``workdir``.

    Returns:
      "page", its path; "runs", name -> how far it is.

    Raises:
      ValueError: where there is no run.
    """
    workdirs = [workdir, *b]
    # In a bucket a path is whole as it is.
    places = [
        pathlib.PurePosixPath(d) if buckets.is_remote(d) else d.resolve()
        for d in workdirs
    ]
    above = os.path.commonpath([place.parent for place in places])
    runs = [
        read_run(workdir, str(place.relative_to(above)))
        for workdir, place in zip(workdirs, places, strict=True)
    ]
    page = output or workdir / "report.html"
    write_page(runs, page)
    return {
        "page": str(page),
        "runs": {run.name: state_of(run) for run in runs},
    }


def state_of(run: RunRecords) -> str:
    """Tell a run's objective and how far it is."""
    settings = flatten_dict(run.settings, sep=".")
    steps = settings.get("train.steps", 0)
    step = max((r["step"] for r in (*run.metrics, *run.evals)), default=0)
    finished = any(r.get("final") and r["step"] >= steps for r in run.evals)
    state = "finished" if finished else "not finished"
    return f"{settings.get('objective')}, step {step} of {steps}, {state}"


def tables_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Tabulate evaluations on the way and those of ``topd eval``.

    Args:
      runs: of the page.

    Returns:
      Tables with rows: "label", "heads" and "rows" of texts.
    """
    text, ends = pages.number_text, pages.range_text
    logged = {name for run in runs for row in run.evals for name in row}
    names = [name for name in _EVALUATED if name in logged]
    several = len(runs) > 1
    run_head = ["run"] * several

    def run_cell(run: RunRecords) -> list[str]:
        return [run.name] * several

    on_the_way = [
        [str(row["step"]), *run_cell(run),
         "test" if row.get("final") else "validation",
         *(_evaluated(row, name) for name in names)]
        for run in runs
        for row in sorted(run.evals, key=lambda r: r["step"])
    ]  # fmt: skip
    benchmarks = [
        [name, *run_cell(run), which, text(scores.get("step")), score,
         text(value["value"]) + ends(*value["interval"])]
        for run in runs
        for which, scores in run.benchmarks.items()
        for name, entry in (scores.get("benchmarks") or {}).items()
        for score, value in (entry.get("summary") or {}).items()
        if isinstance(value, dict) and "interval" in value
    ]  # fmt: skip
    columns = [_EVALUATED[name] for name in names]
    tables = [
        {"label": "Evaluations on the way", "rows": on_the_way,
         "heads": ["step", *run_head, "problems of", *columns]},
        {"label": "topd eval", "rows": benchmarks, "heads":
         ["benchmark", *run_head, "student", "step", "number", "value"]},
    ]  # fmt: skip
    return [table for table in tables if table["rows"]]


def _evaluated(row: Row, name: str) -> str:
    text = pages.number_text(row.get(name))
    ends = pages.range_text(row.get(f"{name}_low"), row.get(f"{name}_high"))
    return text if pages.number(row.get(name)) is None else text + ends


def problems_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Gather the answers to each problem that evaluations wrote down.

    Args:
      runs: of the page.

    Returns:
      Problems in the order in which they were asked, those of the test last:
      "problem", "answer", "final", and "answers" (rows of the log with their
      "run") by step and run.
    """
    problems: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run.problems:
            key = tuple(row.get(k) for k in ("final", "problem", "answer"))
            problems.setdefault(key, []).append({"run": run.name, **row})
    return [
        {"final": final, "problem": problem, "answer": answer,
         "answers": sorted(answers, key=lambda row: row["step"])}
        for (final, problem, answer), answers
        in sorted(problems.items(), key=lambda item: bool(item[0][0]))
    ]  # fmt: skip


def settings_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Compare the settings of runs with the defaults.

    Args:
      runs: of the page.

    Returns:
      For each setting "name", "values" (a text a run), "default" and whether
      it "differs", or has no default to keep.
    """
    settings = [flatten_dict(run.settings, sep=".") for run in runs]
    defaults: dict[str, object] = {}
    for run in runs:
        defaults |= defaults_of(run.settings)

    def text(values: dict, name: str) -> str:
        value = values.get(name)
        if name not in values or (isinstance(value, str) and value):
            return value or "–"
        return json.dumps(value)

    return [
        {
            "name": name,
            "values": [text(values, name) for values in settings],
            "default": text(defaults, name),
            # One of an older version has no default to keep.
            "differs": name not in defaults
            or any(values.get(name) != defaults[name] for values in settings),
        }
        for name in dict.fromkeys(key for values in settings for key in values)
    ]
