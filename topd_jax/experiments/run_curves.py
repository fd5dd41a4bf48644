"""Curves and tables of the numbers that runs logged, for their page.

A *series* is one line of a chart: "name", "colour" (0..5), "kind" (training,
validation or test), "steps", "values" and, where known, the ends "low" and
"high" of 95 % intervals. Whatever is missing or not finite is None.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Metric -> title and unit of a chart of its own; the rest stands below.
_CHARTS = {
    "loss": ("Loss", "nats a token"),
    "exact_match": ("Right answers", "share, 95 % interval"),
    "reverse_kl": ("Reverse KL", "nats a token"),
    "divergent": ("Divergent candidates", "share"),
    "distance": ("Transport distance of windows", "0 to 2"),
    "guidance": ("Guidance loss", "nats a token"),
    "length_mean": ("Length of completions", "tokens, mean"),
    "truncated": ("Cut off at the limit", "share"),
    "student_entropy": ("Entropy of the student", "nats a token"),
    "top_k_overlap": ("Overlap of the top k", "share"),
    "grad_norm": ("Norm of the gradient", "before clipping"),
}
# Charts of numbers that lie in 0..1, all of them shares.
_SHARES = ("exact_match", "divergent", "truncated", "top_k_overlap")
# One chart of several metrics, a line each.
_PHASES = ("rollout", "annotate", "update", "statistics")
_INTERVAL = {"exact_match": ("exact_match_low", "exact_match_high")}
# No numbers of a curve: constants, or the ends of an interval.
_NOT_DRAWN = {"step", "final", "temperature", "problems", "correct",
              "exact_match_low", "exact_match_high", "rate_tokens"}  # fmt: skip
_COLOURS = 6
# Steps whose speed is one point.
_TOGETHER = 10
# Points a series; a screen shows no more.
_POINTS = 600

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


def curves_of(runs: Sequence[Any]) -> tuple[list[dict[str, Any]], int]:
    """Charts of everything that was logged more than never.

    Args:
      runs: :class:`~topd_jax.experiments.run_page.RunRecords`.

    Returns:
      (charts: "title", "unit", "more" (below the fold), "bounds" (of the axis,
      or None) and "series"; how many logged steps a point of training is the
      mean of, at most).
    """
    names = {}
    for run in runs:
        for row in (*run.metrics, *run.evals):
            names |= {key.partition("/")[0]: None for key in row}
    ordered = [n for n in _CHARTS if n in names]
    ordered += [n for n in sorted(names) if n not in _CHARTS]
    curves, blocks = [], [1]
    for name in ordered:
        if name in _NOT_DRAWN or name.startswith("seconds_"):
            continue
        series = _series_of(runs, name, blocks)
        if series:
            title, unit = _CHARTS.get(name, (name.replace("_", " "), ""))
            curves.append(
                {"title": title, "unit": unit, "more": name not in _CHARTS}
                | {"bounds": [0, 1] if name in _SHARES else None}
                | {"series": series}
            )
    for title, unit, series in (
        *(
            (title, "in timed steps", series)
            for title, series in _phases_of(runs, blocks)
        ),
        ("Speed", f"tokens a second, over {_TOGETHER} steps", _rates(runs)),
    ):
        if series:
            curves.append(
                {"title": title, "unit": unit, "more": False}
                | {"bounds": None, "series": series}
            )
    return curves, max(blocks)


def _series_of(
    runs: Sequence[Any], name: str, blocks: list[int]
) -> list[dict[str, Any]]:
    own = sorted(
        {
            key
            for run in runs
            for row in (*run.metrics, *run.evals)
            for key in row
            if key.partition("/")[0] == name
        }
    )
    lines = []
    for place, run in enumerate(runs):
        for key in own:
            teacher = key.partition("/")[2]
            for kind, rows in _kinds(run):
                line = _line(rows, key, kind, blocks)
                if line:
                    label = [run.name] if len(runs) > 1 else []
                    label += [teacher] if teacher else []
                    lines.append((place, teacher, kind, label, line))
    teachers = sorted({teacher for _, teacher, *_ in lines})
    kinds = ["training", "validation", "test"]
    out = []
    for place, teacher, kind, label, line in lines:
        colour = kinds.index(kind)
        if len(teachers) > 1:
            colour = place * len(teachers) + teachers.index(teacher)
        elif len(runs) > 1:
            colour = place
        out.append(
            {"name": ", ".join([*label, kind]), "colour": colour % _COLOURS}
            | {"kind": kind, **line}
        )
    return out


def _kinds(run: Any) -> list[tuple[str, list]]:
    return [
        ("training", list(run.metrics)),
        ("validation", [r for r in run.evals if not r.get("final")]),
        ("test", [r for r in run.evals if r.get("final")]),
    ]


def _phases_of(
    runs: Sequence[Any], blocks: list[int]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """A chart of one run's phases, or a chart a phase of several runs."""
    lines = {
        (place, phase): line
        for phase in _PHASES
        for place, run in enumerate(runs)
        if (line := _line(run.metrics, f"seconds_{phase}", "training", blocks))
    }
    charts: dict[str, list[dict[str, Any]]] = {}
    for (place, phase), line in lines.items():
        alone = len(runs) == 1
        title = "Seconds of a phase" if alone else f"Seconds of {phase}"
        charts.setdefault(title, []).append(
            {
                "name": phase if alone else runs[place].name,
                "colour": _PHASES.index(phase) if alone else place % _COLOURS,
                "kind": "training",
                **line,
            }
        )
    return list(charts.items())


def _rates(runs: Sequence[Any]) -> list[dict[str, Any]]:
    """Tokens a second; a step by itself may bear its neighbour's time."""
    out = []
    for place, run in enumerate(runs):
        rows = _timed(run)
        size = max(_TOGETHER, -(-len(rows) // _POINTS))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        if rows:
            out.append(
                {
                    "name": run.name if len(runs) > 1 else "training",
                    "colour": place % _COLOURS,
                    "kind": "training",
                    "steps": [part[-1]["step"] for part in parts],
                    "values": [_rate(part) for part in parts],
                }
            )
    return out


def _timed(run: Any) -> list[Any]:
    """The steps whose seconds are known, without the first: it compiles."""
    rows = sorted(run.metrics, key=lambda r: r["step"])[1:]
    return [r for r in rows if _number(r.get("seconds"))]


def _rate(rows: Sequence[Any]) -> float | None:
    tokens = sum(_number(r.get("num_tokens")) or 0 for r in rows)
    return _number(tokens / sum(r["seconds"] for r in rows))


def _line(
    rows: Sequence[Any], key: str, kind: str, blocks: list[int]
) -> dict[str, Any] | None:
    """Steps and values of a key, in order; None where it has no value."""
    rows = sorted((r for r in rows if key in r), key=lambda r: r["step"])
    values = [_number(r[key]) for r in rows]
    if all(v is None for v in values):
        return None
    steps = [r["step"] for r in rows]
    if kind == "training":
        size = -(-len(rows) // _POINTS)
        blocks.append(size)
        cuts = range(0, len(rows), size)
        return {
            # The last step of each block: what is known by then.
            "steps": [steps[min(i + size, len(rows)) - 1] for i in cuts],
            "values": [_mean(values[i : i + size]) for i in cuts],
        }
    line = {"steps": steps, "values": values}
    name, slash, teacher = key.partition("/")
    for end, source in zip(("low", "high"), _INTERVAL.get(name, ()),
                           strict=False):  # fmt: skip
        line[end] = [_number(r.get(source + slash + teacher)) for r in rows]
    return line


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return None
    # Six digits are more than a screen shows.
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _number(statistics.fmean(known)) if known else None


def tables_of(runs: Sequence[Any]) -> list[dict[str, Any]]:
    """Evaluations on the way, those of ``topd eval``, and speed.

    Args:
      runs: as in :func:`curves_of`.

    Returns:
      Tables with rows: "section" of the page, "label", "heads" and "rows" of
      texts, numbers, None, and "value", "low" and "high" of an interval.
    """
    tables = [_evaluations(runs), _benchmarks(runs), _speed(runs)]
    return [table for table in tables if table["rows"]]


def _evaluations(runs: Sequence[Any]) -> dict[str, Any]:
    known = {name for run in runs for row in run.evals for name in row}
    names = [name for name in _EVALUATED if name in known]
    rows = [
        [
            row["step"],
            *([run.name] if len(runs) > 1 else []),
            "test" if row.get("final") else "validation",
            *(_cell(row, name) for name in names),
        ]
        for run in runs
        for row in sorted(run.evals, key=lambda r: r["step"])
    ]
    heads = ["step", *(["run"] if len(runs) > 1 else []), "problems of"]
    return {
        "section": "evaluations",
        "label": "Evaluations on the way",
        "heads": heads + [_EVALUATED[name] for name in names],
        "rows": rows,
    }


def _cell(row: Any, name: str) -> Any:
    value = _number(row.get(name))
    ends = [_number(row.get(end)) for end in _INTERVAL.get(name, ())]
    if value is None or not ends or None in ends:
        return value
    return {"value": value, "low": ends[0], "high": ends[1]}


def _benchmarks(runs: Sequence[Any]) -> dict[str, Any]:
    """One row a benchmark and number with an interval."""
    rows = []
    for run in runs:
        for which, found in run.benchmarks.items():
            for name, entry in (found.get("benchmarks") or {}).items():
                for number, value in (entry.get("summary") or {}).items():
                    if not (isinstance(value, dict) and "interval" in value):
                        continue
                    low, high = map(_number, value["interval"])
                    cell = {"value": _number(value["value"]), "low": low}
                    rows.append(
                        [
                            name,
                            *([run.name] if len(runs) > 1 else []),
                            which, found.get("step"), number,
                            cell | {"high": high},
                        ]
                    )  # fmt: skip
    run = ["run"] if len(runs) > 1 else []
    return {
        "section": "evaluations",
        "label": "topd eval",
        "heads": ["benchmark", *run, "student", "step", "number", "value"],
        "rows": rows,
    }  # fmt: skip


def _speed(runs: Sequence[Any]) -> dict[str, Any]:
    rows = []
    for run in runs:
        timed = _timed(run)
        name = [run.name] if len(runs) > 1 else []
        for label, key in (
            ("step, seconds", "seconds"),
            *((f"{phase}, seconds", f"seconds_{phase}") for phase in _PHASES),
        ):
            known = [v for r in timed if (v := _number(r.get(key)))]
            if known:
                middle = _number(statistics.median(known))
                rows.append([label, *name, len(known), _mean(known), middle])
        if timed:
            rate = _rate(timed)
            rows.append(["tokens a second", *name, len(timed), rate, None])
    return {
        "section": "speed",
        "label": "Without the first step, which compiles",
        "heads": ["", *(["run"] if len(runs) > 1 else []), "steps", "mean",
                  "median"],
        "rows": rows,
    }  # fmt: skip
