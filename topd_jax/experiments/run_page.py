"""One HTML page of what runs left in their work directories (``topd report``).

Curves, evaluations, answers to the same problems over time, and the
settings that differ. A run that still goes on, or lacks parts, has a page too.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from topd_jax.experiments import pages, run_curves
from topd_jax.experiments.run_records import Row, RunRecords, read_run
from topd_jax.settings import flat
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
# What rows of logs may lack.
_TEXTS = {"prompt": "", "completion": "", "teacher": "", "right": None,
          "truncated": False}  # fmt: skip


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
        facts=facts_of(runs),
        runs=[run.name for run in runs],
        plotly=get_plotlyjs(),
        charts=[
            chart
            | {"html": run_curves.html_of(chart),
               "summary": run_curves.summary_of(chart)}
            for chart in run_curves.curves_of(runs)
        ],
        tables=tables_of(runs),
        problems=problems_of(runs),
        completions=[
            {"run": run.name, **_TEXTS, **row}
            for run in runs
            for row in sorted(run.completions, key=lambda r: r["step"])
        ],
        settings=settings_of(runs),
    )  # fmt: skip


def report(
    workdirs: Iterable[pathlib.Path], output: pathlib.Path | None
) -> dict[str, Any]:
    """Read runs and write their page.

    Args:
      workdirs: of the runs, the first one's first.
      output: the HTML file; None is ``report.html`` in the first.

    Returns:
      "page", its path; "runs", name -> how far it is.

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


def facts_of(runs: Sequence[RunRecords]) -> dict[str, str]:
    """Return what stands at the top of the page.

    Args:
      runs: of the page.

    Returns:
      name -> text: the only run's objective, models and state, or the names of
      several and their states.
    """
    if len(runs) > 1:
        return {run.name: _state(run) for run in runs}
    (run,) = runs
    settings = flat(run.settings)
    facts = {"run": run.name}
    for fact, setting in (
        ("objective", "objective"),
        ("student", "student.source"),
        ("teacher", "teacher.source"),
        ("seed", "seed"),
    ):
        if setting in settings:
            facts[fact] = str(settings[setting])
    return facts | {"state": _state(run)}


def _state(run: RunRecords) -> str:
    step = max((r["step"] for r in (*run.metrics, *run.evals)), default=0)
    steps = flat(run.settings).get("train.steps")
    progress = f"step {step}" + (f" of {steps}" if steps else "")
    ends = [r for r in run.evals if r.get("final")]
    if not ends:
        return f"{progress}, not finished"
    right = pages.number(ends[-1].get("exact_match"))
    if right is None:
        return f"{progress}, finished"
    return f"{progress}, finished with {100 * right:.1f} % right"


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
    on_the_way = [
        [str(row["step"]), run.name,
         "test" if row.get("final") else "validation",
         *(_evaluated(row, name) for name in names)]
        for run in runs
        for row in sorted(run.evals, key=lambda r: r["step"])
    ]  # fmt: skip
    benchmarks = [
        [name, run.name, which, text(scores.get("step")), score,
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
         "heads": ["step", "run", "problems of", *columns]},
        {"label": "topd eval", "rows": benchmarks,
         "heads": ["benchmark", "run", "student", "step", "number", "value"]},
    ]  # fmt: skip
    if len(runs) == 1:  # its name is in the title
        for table in tables:
            del table["heads"][1]
            for row in table["rows"]:
                del row[1]
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
    problems: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        for row in sorted(run.problems, key=lambda r: r["step"]):
            key = {
                "final": bool(row.get("final")),
                "problem": str(row.get("problem", "")),
                "answer": str(row.get("answer", "")),
            }
            entry = problems.setdefault(
                tuple(key.values()), key | {"answers": []}
            )
            entry["answers"].append({"run": run.name, **_TEXTS, **row})
    for entry in problems.values():
        entry["answers"].sort(key=lambda row: row["step"])
    return sorted(problems.values(), key=lambda entry: entry["final"])


def settings_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Compare the settings of runs with the defaults.

    Args:
      runs: of the page.

    Returns:
      For each setting "name", "values" (a text a run), "default" and whether
      it "differs", or has no default to keep.
    """
    settings = [flat(run.settings) for run in runs]
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
