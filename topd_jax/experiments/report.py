"""Tables and pictures of a sweep, from the lines of its record.

Accuracies are pooled over seeds; their 95 % intervals resample seeds and
problems (a two-level bootstrap), and every variant is compared with plain
on-policy distillation on the same problems and seeds.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from topd_jax.experiments import plots

BASELINE = "opd"
# Accuracies whose first crossing is reported.
MILESTONES = (0.5, 0.6, 0.7, 0.8)
_RESAMPLES = 4000
# Above as many comparisons a picture says more than a table.
_FEW = 7

TITLES = {
    "start": "student before distillation",
    "teacher": "teacher",
    "opd": "OPD",
    "opd+suppress": "OPD, false alarms capped",
    "opd+suppress_control": "OPD, matched divergent capped (control)",
    "n_step": "n-step weights",
    "topd:teacher": "TOPD, context teacher",
    "topd:student": "TOPD, context student",
    "topd+suppress": "TOPD, false alarms capped",
    "entropy_aware": "entropy-aware (2603.07079)",
    "trust_region": "trust region (2606.01249)",
    "tip": "token importance (2604.14084)",
    "teachability": "teachability (2605.26844)",
    "fire": "FiRe (2606.02684)",
    "agreement": "agreement cut (2606.09471)",
    "prefix": "prefix-weighted (2606.22600)",
}


SCORES = {
    "loss": "loss alone",
    "future_loss": "mean loss of the window",
    "reverse_kl": "reverse KL alone",
    "future_kl": "mean reverse KL of the window",
    "hidden_distance": "distance of hidden states",
    "loss_and_distance": "ranks of loss and distance",
}


def title(name: str) -> str:
    """What a table calls a run.

    Args:
      name: an entry of ``sweep.variants``.

    Returns:
      The variant's title, and every setting that was changed behind it.
    """
    head, *changes = name.split("/")
    words = [TITLES.get(head) or TITLES.get(head.partition(":")[0], head)]
    for change in changes:
        key, _, value = change.partition("=")
        key = key.rpartition(".")[2].replace("_", " ")
        words.append(f"{key} {value}")
    return ", ".join(words)


def write_report(
    rows: Sequence[dict[str, Any]], folder: pathlib.Path
) -> dict[str, Any]:
    """Writes report.json, table.md and the pictures.

    Args:
      rows: lines of a record, all of one sweep.
      folder: made where it is missing.

    Returns:
      name -> path of each file; "table" holds the table itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(rows)
    table = markdown(summary)
    (folder / "report.json").write_text(json.dumps(summary, indent=1))
    (folder / "table.md").write_text(table)
    files = {
        "report": str(folder / "report.json"),
        "table_file": str(folder / "table.md"),
    }
    if any("curve" in r for r in rows):
        files["curves"] = str(plots.curves(rows, TITLES, folder))
    if sum("gain" in v for v in summary["variants"]) > _FEW:
        files["gains"] = str(plots.gains(summary["variants"], folder))
    found = [r["detector"] for r in rows if "detector" in r]
    if found:
        files["distances"] = str(plots.distances(found, folder))
    print(table, flush=True)
    return files


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of a sweep.

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
    _adjust([v for v in variants if "gain" in v])
    return {
        "seeds": sorted({r["seed"] for r in rows}),
        "machine": sorted({r["machine"] for r in rows}),
        "variants": variants,
        "detector": _mean_detector(
            [r["detector"] for r in rows if "detector" in r]
        ),
    }


def grades_of(evaluation: dict[str, Any]) -> np.ndarray:
    """bool[N]: which problems were right, unpacked from the record."""
    count = evaluation["problems"]
    bits = f"{int(evaluation['grades'], 16):0{count}b}"
    return np.array([b == "1" for b in bits])


def interval(grades: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over seeds and problems.

    Args:
      grades: float[S, N], one row a seed (or a difference of two runs).

    Returns:
      (low, high): 2.5th and 97.5th percentile of resampling seeds, then
      problems, with replacement.
    """
    rng = np.random.default_rng(0)
    seeds, problems = grades.shape
    pick = rng.integers(seeds, size=(_RESAMPLES, seeds))
    # The sum over chosen seeds first: problems are shared by the seeds.
    of_seeds = (
        np.stack([(pick == s).sum(1) for s in range(seeds)], axis=1)
        @ grades
        / seeds
    )
    chosen = rng.integers(problems, size=(_RESAMPLES, problems))
    means = np.take_along_axis(of_seeds, chosen, axis=1).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _adjust(variants: list[dict[str, Any]]) -> None:
    """Adds "p", two-sided, adjusted for how many variants were compared.

    The bootstrap's interval as that of a normal; Holm's step-down method.
    """
    order = sorted(
        variants, key=lambda v: -abs(v["gain"]) / max(_error(v), 1e-12)
    )
    largest = 0.0
    for i, v in enumerate(order):
        z = abs(v["gain"]) / max(_error(v), 1e-12)
        raw = math.erfc(z / math.sqrt(2))
        largest = max(largest, min(raw * (len(order) - i), 1.0))
        v["p"] = largest


def _error(v: dict[str, Any]) -> float:
    low, high = v["gain_interval"]
    return (high - low) / (2 * 1.959964)


def _variant(
    name: str, rows: list[dict[str, Any]], base: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    evaluations = [r["evaluation"] for r in rows]
    out: dict[str, Any] = {
        "name": name,
        "title": title(name),
        "seeds": [r["seed"] for r in rows],
        "reverse_kl": _mean(e["reverse_kl"] for e in evaluations),
        "length_mean": _mean(e["length_mean"] for e in evaluations),
    }
    if evaluations[0]["exact_match"] is not None:
        grades = np.stack([grades_of(e) for e in evaluations]).astype(float)
        out["exact_match"] = float(grades.mean())
        out["interval"] = interval(grades)
        out["greedy"] = _mean(r["greedy"]["exact_match"] for r in rows)
        pairs = [
            grades_of(r["evaluation"]).astype(float)
            - grades_of(base[r["seed"]]["evaluation"])
            for r in rows
            if r["seed"] in base
        ]
        if pairs and name not in (BASELINE, "start", "teacher"):
            out["gain"] = float(np.mean(pairs))
            out["gain_interval"] = interval(np.stack(pairs))
        if "curve" in rows[0]:
            last = [r["curve"][-1] for r in rows]
            out["validation"] = _mean(p["exact_match"] for p in last)
    if "curve" in rows[0]:
        out |= _cost(rows, base)
    return out


def _cost(
    rows: list[dict[str, Any]], base: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    seconds = [r["seconds_step"] for r in rows]
    ratios = [
        r["seconds_step"] / base[r["seed"]]["seconds_step"]
        for r in rows
        if r["seed"] in base
    ]
    phases = rows[0]["seconds_phases"]
    return {
        "steps": rows[0]["steps"],
        "tokens": _mean(r["tokens"] for r in rows),
        "seconds_step": _mean(seconds),
        "overhead": _mean(ratios) if ratios else None,
        "seconds_phases": {
            p: _mean(r["seconds_phases"][p] for r in rows) for p in phases
        },
        "milestones": {
            str(m): _crossing([r["curve"] for r in rows], m) for m in MILESTONES
        },
    }


def _crossing(
    curves: list[list[dict[str, Any]]], level: float
) -> dict[str, float] | None:
    """Mean steps and tokens to a validation accuracy; None if any fails."""
    first = [
        next((p for p in c if (p["exact_match"] or 0) >= level), None)
        for c in curves
    ]
    if None in first:
        return None
    return {
        "steps": _mean(p["step"] for p in first),
        "tokens": _mean(p["tokens"] for p in first),
    }


def _mean_detector(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means over seeds of every number; histograms are left to the plot."""
    if not found:
        return None
    if isinstance(found[0], dict):
        return {
            k: _mean_detector([f[k] for f in found])
            for k in found[0]
            if k != "histogram"
        }
    values = [f for f in found if f is not None]
    return _mean(values) if values else None


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def markdown(summary: dict[str, Any]) -> str:
    """The table that a README shows.

    Args:
      summary: of :func:`summarise`.

    Returns:
      Markdown: the variants, then the detector.
    """
    head = (
        "| | seeds | exact match (95 %) | gain over OPD (95 %) | p | greedy "
        "| validation | reverse KL | steps (rollout tokens) to 50 / 60 / 70 / "
        "80 % | s a step | ÷ OPD |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = [_line(v) for v in summary["variants"]]
    seeds = ", ".join(map(str, summary["seeds"]))
    foot = (
        f"\nSeeds {seeds}; {'; '.join(summary['machine'])}. p: adjusted for "
        "the number of comparisons (Holm).\n"
    )
    found = summary["detector"]
    return head + "\n".join(lines) + "\n" + foot + _detector_table(found)


def _line(v: dict[str, Any]) -> str:
    cells = [v["title"], str(len(v["seeds"]))]
    if "exact_match" in v:
        low, high = v["interval"]
        cells.append(f"{v['exact_match']:.3f} ({low:.3f}–{high:.3f})")
    else:
        cells.append("")
    if "gain" in v:
        low, high = v["gain_interval"]
        cells.append(f"{v['gain']:+.3f} ({low:+.3f} to {high:+.3f})")
        cells.append(f"{v['p']:.3f}" if v["p"] >= 0.001 else "< 0.001")
    else:
        cells += ["", ""]
    for name in ("greedy", "validation"):
        cells.append(f"{v[name]:.3f}" if name in v else "")
    cells.append(f"{v['reverse_kl']:.3f}")
    if "milestones" in v:
        found = v["milestones"].values()
        cells.append(
            " / ".join(
                f"{m['steps']:.0f} ({m['tokens'] / 1000:.0f}k)" if m else "–"
                for m in found
            )
        )
        cells.append(f"{v['seconds_step']:.3f}")
        cells.append(f"{v['overhead']:.2f}" if v["overhead"] else "")
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def _detector_table(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    text = (
        "\n| detector against the truth | positives | AUC | precision "
        "| recall |\n|---|---|---|---|---|\n"
    )
    for label, what in (
        ("fork", "the token is the fork"),
        ("window_fork", "the fork lies in the window"),
    ):
        for score, numbers in found[label].items():
            if score == "share":
                continue
            values = [found[label]["share"]]
            values += [numbers[k] for k in ("auc", "precision", "recall")]
            cells = ["–" if v is None else f"{v:.3f}" for v in values]
            by = SCORES.get(score, score.replace("_", " "))
            text += f"| {what}: by {by} | " + " | ".join(cells) + " |\n"
    if "cost" in found:
        ratio = found["cost"]["ahead"] / found["cost"]["plain"]
        text += (
            f"\nBranches and transport make an annotation {ratio:.2f} times as "
            "long; losses and entropies need neither.\n"
        )
    return text
