"""Tables and learning curves of a sweep, from the lines of its record.

Accuracies are pooled over seeds. Their 95 % intervals resample seeds and
problems (a two-level bootstrap), and every variant is compared with plain
on-policy distillation on the same problems and seeds. Where runs trained in
several tiny worlds, each has a table, and a picture shows gains by how sure the
student is of its errors.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Sequence
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
from topd_jax.experiments.certainty import pays_below
from topd_jax.objectives.loading import make_objective

BASELINE = "opd"
_TARGETS = {
    "fork": "the token is the fork",
    "window_fork": "the fork lies in the window",
}
_DETECTORS = {
    "loss": "loss alone",
    "future_loss": "mean loss of the window",
}


def write_report(
    rows: Sequence[dict[str, Any]],
    folder: pathlib.Path,
    baseline: str = BASELINE,
) -> dict[str, Any]:
    """Write report.json, table.md and the curves.

    Args:
      rows: lines of a record, all of one sweep.
      folder: created where it is missing.
      baseline: name of the variant that gains are over.

    Returns:
      name -> path of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    worlds = dict.fromkeys(r.get("world", "") for r in rows)
    by_world = {
        world: summarize(
            [r for r in rows if r.get("world", "") == world], baseline
        )
        for world in worlds
    }
    summary = by_world if len(worlds) > 1 else by_world[next(iter(worlds))]
    table = "\n".join(
        (f"## {world}\n\n" if world else "") + markdown(of_world)
        for world, of_world in by_world.items()
    )
    files = {
        "report": folder / "report.json",
        "table_file": folder / "table.md",
    }
    files["report"].write_text(json.dumps(summary, indent=1))
    files["table_file"].write_text(table)
    if len(worlds) > 1:
        files["certainty"] = plots.gains(
            by_world, folder / "certainty.png", below=_predicted(rows)
        )
    elif any("curve" in r for r in rows):
        files["curves"] = plots.curves(rows, folder / "curves.png")
    return {name: str(path) for name, path in files.items()}


def _predicted(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return where the first guided objective is predicted to pay."""
    starts = [r["evaluation"] for r in rows if r["name"] == "start"]
    tokens = _mean(e["length_mean"] for e in starts) or math.nan
    for name in dict.fromkeys(r["name"] for r in rows):
        if name not in ("start", "teacher"):
            objective = make_objective(name.partition(";")[0])
            if (found := pays_below(objective, tokens=tokens)) is not None:
                return found
    return None


def summarize(
    rows: Sequence[dict[str, Any]], baseline: str = BASELINE
) -> dict[str, Any]:
    """Return all numbers of a sweep.

    Args:
      rows: lines of a record, all of one sweep.
      baseline: name of the variant that gains are over.

    Returns:
      JSON-able: "baseline"; "variants", one entry a name in the order of
      their first line; "detector" and "right_at_forks", averaged over seeds;
      "machine" and "seeds".
    """
    names = dict.fromkeys(r["name"] for r in rows)
    base = {r["seed"]: r for r in rows if r["name"] == baseline}
    variants = [
        _variant(n, [r for r in rows if r["name"] == n], base) for n in names
    ]
    compared = [v for v in variants if "gain" in v]
    p_values = holm([normal_p(v["gain"], v["gain_interval"]) for v in compared])
    for variant, p in zip(compared, p_values, strict=True):
        variant["p"] = p
    detectors = [r["detector"] for r in rows if "detector" in r]
    certainties = [r["right_at_forks"] for r in rows if "right_at_forks" in r]
    return {
        "baseline": baseline,
        "seeds": sorted({r["seed"] for r in rows}),
        "machine": sorted({r["machine"] for r in rows}),
        "variants": variants,
        "right_at_forks": _means(certainties) if certainties else None,
        "detector": {
            target: _means([e[target] for e in detectors])
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
    }
    paired = [(r, base[r["seed"]]) for r in rows if r["seed"] in base]
    trained = "curve" in rows[0]
    if evaluations[0]["exact_match"] is not None:
        grades = np.stack([_grades(r) for r in rows])
        numbers["exact_match"] = float(grades.mean())
        numbers["interval"] = bootstrap_interval(grades)
        numbers["greedy"] = _mean(r["greedy"]["exact_match"] for r in rows)
        if paired and trained and paired[0][1]["name"] != name:
            gains = np.stack([_grades(r) - _grades(b) for r, b in paired])
            numbers["gain"] = float(gains.mean())
            numbers["gain_interval"] = bootstrap_interval(gains)
        if trained:
            last = [r["curve"][-1] for r in rows]
            # With eval.every=0 the only one is of the start.
            numbers["validation"] = _mean(
                p["exact_match"] for p in last if p["step"]
            )
    if trained:
        numbers["seconds_step"] = _mean(r["seconds_step"] for r in rows)
        numbers["overhead"] = _mean(
            r["seconds_step"] / b["seconds_step"]
            for r, b in paired
            if r["seconds_step"] and b.get("seconds_step")
        )
    return numbers


def _grades(row: dict[str, Any]) -> np.ndarray:
    return unpack_grades(row["evaluation"]).astype(float)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what exists, None where nothing does."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _means(entries: Sequence[Any]) -> Any:
    """Return means over trees of numbers, number by number."""
    return jax.tree.map(
        lambda *values: _mean(values), *entries, is_leaf=lambda x: x is None
    )


def markdown(summary: dict[str, Any]) -> str:
    """Return the tables of a sweep.

    Args:
      summary: of :func:`summarize`.

    Returns:
      Markdown: the variants, then the detectors.
    """
    base = "OPD" if summary["baseline"] == BASELINE else summary["baseline"]
    variants = _table(
        ("", "seeds", "exact match (95 %)", f"gain over {base} (95 %)", "p",
         "greedy", "validation", "reverse KL", "s a step", f"÷ {base}"),
        map(_cells, summary["variants"]),
    )  # fmt: skip
    seeds = ", ".join(map(str, summary["seeds"]))
    foot = (
        f"\nSeeds {seeds}; {'; '.join(summary['machine'])}. p: adjusted for "
        "the number of comparisons (Holm).\n"
    )
    if len(summary["seeds"]) == 1:
        foot += (
            "One seed: intervals and p are of these students, and say nothing "
            "of what another seed would give.\n"
        )
    certainty = summary["right_at_forks"]
    if certainty and certainty["median"] is not None:  # there were forks
        low, median, high = (
            f"{certainty[name]:.2g}" for name in ("low", "median", "high")
        )
        foot += (
            f"The student gives the teacher's token at forks, before "
            f"training, a median probability of {median} (quartiles {low} and "
            f"{high}).\n"
        )
    if not summary["detector"]:
        return variants + foot
    detectors = _table(
        ("detector against the truth", "positives", "AUC", "precision",
         "recall"),
        [
            [f"{_TARGETS[target]}: by "
             + _DETECTORS.get(name, name.replace("_", " ")),
             *(_number(x) or "–" for x in (numbers["share"], *found.values()))]
            for target, numbers in summary["detector"].items()
            for name, found in numbers.items() if name != "share"
        ],
    )  # fmt: skip
    return f"{variants}{foot}\n{detectors}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (heads, ["---"] * len(heads), *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(v: dict[str, Any]) -> list[str]:
    """Return a variant's cells; those of unknown numbers are empty."""
    accuracy = gain = p = ""
    if "exact_match" in v:
        low, high = v["interval"]
        accuracy = f"{v['exact_match']:.3f} ({low:.3f}–{high:.3f})"
    if "gain" in v:
        low, high = v["gain_interval"]
        gain = f"{v['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
        p = f"{v['p']:.3f}" if v["p"] >= 0.001 else "< 0.001"
    names = ("greedy", "validation", "reverse_kl", "seconds_step")
    return [
        v["name"], str(len(v["seeds"])), accuracy, gain, p,
        *(_number(v.get(name)) for name in names),
        _number(v.get("overhead"), digits=2),
    ]  # fmt: skip


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
