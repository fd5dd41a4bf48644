"""Tables and pictures of a sweep, from the lines of its record.

Accuracies are pooled over seeds. Their 95 % intervals resample seeds and
problems (a two-level bootstrap), and every variant is compared with plain
on-policy distillation on the same problems and seeds.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from topd_jax.evaluation.comparisons import (
    bootstrap_interval,
    holm,
    normal_p,
    unpack_grades,
)
from topd_jax.experiments import plots
from topd_jax.experiments.variants import BASELINE

# With more comparisons than these a picture of the gains is drawn too.
_FEW = 7

_TARGETS = {
    "fork": "the token is the fork",
    "window_fork": "the fork lies in the window",
}
_DETECTORS = {
    "loss": "loss alone",
    "future_loss": "mean loss of the window",
}


def write_report(
    rows: Sequence[dict[str, Any]], folder: pathlib.Path
) -> dict[str, Any]:
    """Write report.json, table.md and the pictures, and print the table.

    Args:
      rows: lines of a record, all of one sweep.
      folder: created where it is missing.

    Returns:
      name -> path of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(rows)
    table = markdown(summary)
    files = {
        "report": folder / "report.json",
        "table_file": folder / "table.md",
    }
    files["report"].write_text(json.dumps(summary, indent=1))
    files["table_file"].write_text(table)
    if any("curve" in r for r in rows):
        files["curves"] = plots.curves(rows, folder)
    if sum("gain" in v for v in summary["variants"]) > _FEW:
        files["gains"] = plots.gains(summary["variants"], folder)
    print(table, flush=True)
    return {name: str(path) for name, path in files.items()}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return all numbers of a sweep.

    Args:
      rows: lines of a record, all of one sweep.

    Returns:
      JSON-able: "variants", one entry a name in the order of their first
      line; "detector", averaged over seeds; "machine" and "seeds".
    """
    names = list(dict.fromkeys(r["name"] for r in rows))
    base = {r["seed"]: r for r in rows if r["name"] == BASELINE}
    variants = [
        _variant(n, [r for r in rows if r["name"] == n], base) for n in names
    ]
    compared = [v for v in variants if "gain" in v]
    p_values = holm([normal_p(v["gain"], v["gain_interval"]) for v in compared])
    for variant, p in zip(compared, p_values, strict=True):
        variant["p"] = p
    detectors = [r["detector"] for r in rows if "detector" in r]
    return {
        "seeds": sorted({r["seed"] for r in rows}),
        "machine": sorted({r["machine"] for r in rows}),
        "variants": variants,
        "detector": {
            target: _mean_detector([e[target] for e in detectors])
            for target in _TARGETS
            if detectors
        },
    }


def _variant(
    name: str, rows: list[dict[str, Any]], base: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Return one variant's numbers, over its seeds."""
    evaluations = [r["evaluation"] for r in rows]
    numbers: dict[str, Any] = {
        "name": name,
        "seeds": [r["seed"] for r in rows],
        "reverse_kl": _mean(e["reverse_kl"] for e in evaluations),
        "length_mean": _mean(e["length_mean"] for e in evaluations),
    }
    paired = [(r, base[r["seed"]]) for r in rows if r["seed"] in base]
    trained = "curve" in rows[0]
    if evaluations[0]["exact_match"] is not None:
        grades = np.stack([_grades(r) for r in rows])
        numbers["exact_match"] = float(grades.mean())
        numbers["interval"] = bootstrap_interval(grades)
        numbers["greedy"] = _mean(r["greedy"]["exact_match"] for r in rows)
        if paired and trained and name != BASELINE:
            gains = np.stack([_grades(r) - _grades(b) for r, b in paired])
            numbers["gain"] = float(gains.mean())
            numbers["gain_interval"] = bootstrap_interval(gains)
        if trained:
            last = [r["curve"][-1] for r in rows]
            numbers["validation"] = _mean(p["exact_match"] for p in last)
    if trained:
        numbers["steps"] = rows[0]["steps"]
        numbers["tokens"] = _mean(r["tokens"] for r in rows)
        numbers["seconds_step"] = _mean(r["seconds_step"] for r in rows)
        ratios = [r["seconds_step"] / b["seconds_step"] for r, b in paired]
        numbers["overhead"] = _mean(ratios) if ratios else None
    return numbers


def _grades(row: dict[str, Any]) -> np.ndarray:
    return unpack_grades(row["evaluation"]).astype(float)


def _mean_detector(entries: Sequence[Any]) -> Any:
    """Return means over seeds of every number of "detector" entries."""

    def mean(*values: float | None) -> float | None:
        known = [v for v in values if v is not None]
        return _mean(known) if known else None

    return jax.tree.map(mean, *entries, is_leaf=lambda x: x is None)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def markdown(summary: dict[str, Any]) -> str:
    """Return the tables of a sweep.

    Args:
      summary: of :func:`summarize`.

    Returns:
      Markdown: the variants, then the detectors.
    """
    head = (
        "| | seeds | exact match (95 %) | gain over OPD (95 %) | p | greedy "
        "| validation | reverse KL | s a step | ÷ OPD |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = [_line(v) for v in summary["variants"]]
    seeds = ", ".join(map(str, summary["seeds"]))
    foot = (
        f"\nSeeds {seeds}; {'; '.join(summary['machine'])}. p: adjusted for "
        "the number of comparisons (Holm).\n"
    )
    detectors = _detector_table(summary["detector"])
    return head + "\n".join(lines) + "\n" + foot + detectors


def _line(v: dict[str, Any]) -> str:
    """Return a variant's line; cells of numbers that do not exist are empty."""
    accuracy = gain = p = ""
    if "exact_match" in v:
        low, high = v["interval"]
        accuracy = f"{v['exact_match']:.3f} ({low:.3f}–{high:.3f})"
    if "gain" in v:
        low, high = v["gain_interval"]
        gain = f"{v['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
        p = f"{v['p']:.3f}" if v["p"] >= 0.001 else "< 0.001"
    cells = [v["name"], str(len(v["seeds"])), accuracy, gain, p]
    for name in ("greedy", "validation", "reverse_kl", "seconds_step"):
        cells.append(_number(v.get(name), missing=""))
    overhead = v.get("overhead")
    cells.append("" if overhead is None else f"{overhead:.2f}")
    return "| " + " | ".join(cells) + " |"


def _detector_table(targets: dict[str, Any]) -> str:
    lines = [
        "\n| detector against the truth | positives | AUC | precision "
        "| recall |",
        "|---|---|---|---|---|",
    ]
    for target, numbers in targets.items():
        share = numbers["share"]
        for name in (n for n in numbers if n != "share"):
            cells = map(_number, (share, *numbers[name].values()))
            by = _DETECTORS.get(name, name.replace("_", " "))
            lines.append(
                f"| {_TARGETS[target]}: by {by} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n" if targets else ""


def _number(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.3f}"
