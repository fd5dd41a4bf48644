"""What local corrections came to: the numbers of §5.2, and their table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topd_jax.experiments.report import interval

BEFORE = "before"
BASELINE = "opd"
# METHOD §5: means over 1000 prefixes, K = 50, M = 5. §5.2 describes what is
# called context "teacher" here.
PAPER = {
    "mean": {BEFORE: 0.538, "opd": 0.350, "topd:teacher": 0.204},
    "count": 1000,
    "window": 50,
    "updates": 5,
}
# A smaller change of a distance is the solver's noise.
_NOISE = 1e-3


def report(
    found: Mapping[str, Mapping[str, np.ndarray]], as_written: np.ndarray
) -> dict[str, Any]:
    """The numbers of §5.2.

    Args:
      found: of :func:`~topd_jax.experiments.local_correction.measure`.
      as_written: f32[N] distance of the window that the student sampled, by
        which the point was chosen.

    Returns:
      JSON-able: "as_written", its mean; by method "mean", its 95 % bootstrap
      "interval" over prefixes, "median", the shares "first" and "same" of
      prefixes, "skipped" updates and, but for OPD itself, "against_opd": the
      paired "difference" of means, its "interval", and the shares of prefixes
      "nearer" and "farther" than after OPD.
    """
    base = found[BASELINE]["distance"]
    methods: dict[str, Any] = {}
    for name, of_method in found.items():
        distance = of_method["distance"]
        methods[name] = {
            "mean": float(distance.mean()),
            "interval": interval(distance[None]),
            "median": float(np.median(distance)),
            "first": float(of_method["first"].mean()),
            "same": float(of_method["same"].mean()),
            "skipped": int(of_method["skipped"].sum()),
        }
        if name != BASELINE:
            methods[name]["against_opd"] = _against(distance - base)
    return {"as_written": float(np.mean(as_written)), "methods": methods}


def _against(change: np.ndarray) -> dict[str, Any]:
    return {
        "difference": float(change.mean()),
        "interval": interval(change[None]),
        "nearer": float((change < -_NOISE).mean()),
        "farther": float((change > _NOISE).mean()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The numbers beside the paper's, for a terminal.

    Args:
      result: numbers of :func:`report` with "count", "window" and "updates".

    Returns:
      Lines: the mean with its interval, that of the paper, the paired
      difference from OPD, and the shares of prefixes whose continuation has
      the teacher's first token and is the teacher's as a whole.
    """
    lines = [
        f"{result['count']} prefixes, {result['updates']} updates on a window "
        f"of {result['window']} tokens (paper: {PAPER['count']}, "
        f"{PAPER['updates']}, {PAPER['window']})",
        f"{'distance to the teacher':24}{'mean (95 %)':>22}{'paper':>8}"
        f"{'minus OPD (95 %)':>27}{'first':>8}{'same':>8}",
    ]
    for name, m in result["methods"].items():
        low, high = m["interval"]
        mean = f"{m['mean']:.3f} ({low:.3f}–{high:.3f})"
        paper = PAPER["mean"].get(name)
        paper = "–" if paper is None else f"{paper:.3f}"
        change = ""
        if "against_opd" in m:
            than = m["against_opd"]
            low, high = than["interval"]
            change = f"{than['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(
            f"{name:24}{mean:>22}{paper:>8}{change:>27}"
            f"{m['first']:>8.3f}{m['same']:>8.3f}"
        )
    return "\n".join(lines)
