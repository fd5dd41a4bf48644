"""One HTML page that shows what the detector saw in a run's trajectories."""

import pathlib
from typing import Any

import numpy as np

from topd_jax.data.toy_world import truth
from topd_jax.experiments import pages
from topd_jax.experiments.observe import Observed
from topd_jax.training.setup import Pair
from topd_jax.types import Windows

_TRUTH = {truth.OK: "surface", truth.FORK: "fork", truth.AFTER: "after"}


def trajectories_of(
    seen: Observed, pair: Pair, *, window: int, is_world: bool
) -> list[dict[str, Any]]:
    """What the page shows of a batch.

    Args:
      seen: the batch, with one annotation.
      pair: of the run: its tokenizer and grader.
      window: K.
      is_world: whether the truth is known.

    Returns:
      One JSON-able dictionary a trajectory: "problem", "reference", "right"
      (None where not known), "cut", "tokens" (texts), "loss" (nats), "truth"
      (None, or one of surface, fork, after a token) and "candidates", each
      with "at", "distance", "divergent", "student" and "teacher" (the texts
      of the windows), "plan" (shares of each student token, rows sum to 1),
      "truth" and "window_truth" (is the fork in the window?).
    """
    written, (notes,) = seen.trajectories, seen.notes
    labels = None
    if is_world:
        labels = truth.label_batch(
            [r["prompt"] for r in seen.records],
            written.tokens, written.mask, pair.tokenizer, window=window,
        )  # fmt: skip
    ids = [t[m].tolist() for t, m in zip(written.tokens, written.mask,
                                         strict=True)]  # fmt: skip
    grades = pair.grade(seen.records, [pair.tokenizer.decode(i) for i in ids])
    out = []
    for row, record in enumerate(seen.records):
        known = labels and [_TRUTH[int(v)] for v in labels.token[row]]
        slots = np.flatnonzero(notes.candidates.mask[row])
        out.append(
            {
                "problem": record["prompt"],
                "reference": record["answer"],
                "right": None if grades is None else bool(grades[row]),
                "cut": bool(written.truncated[row]),
                "tokens": _texts(pair, ids[row]),
                "loss": _rounded(
                    notes.teacher_token_loss[row][: len(ids[row])]
                ),
                "truth": known and known[: len(ids[row])],
                "candidates": [
                    _candidate(seen, pair, row, slot, labels) for slot in slots
                ],
            }
        )
    return out


def _candidate(
    seen: Observed, pair: Pair, row: int, slot: int, labels: Any
) -> dict[str, Any]:
    (notes,) = seen.notes
    at = int(notes.candidates.positions[row, slot])

    def window(windows: Windows) -> list[str]:
        exists = windows.mask[row, slot]
        return _texts(pair, windows.tokens[row, slot][exists].tolist())

    ours = window(notes.student_windows)
    theirs = window(notes.teacher_windows)
    plan = notes.plan[row, slot][: len(ours), : len(theirs)]
    return {
        "at": at,
        "distance": round(float(notes.distance[row, slot]), 4),
        "divergent": bool(notes.divergent[row, slot]),
        "student": ours,
        "teacher": theirs,
        "plan": [_rounded(line * len(ours), 3) for line in plan],
        "truth": labels and _TRUTH[int(labels.token[row, at])],
        "window_truth": labels and _TRUTH[int(labels.window[row, at])],
    }


def _texts(pair: Pair, ids: list[int]) -> list[str]:
    ends = set(pair.tokenizer.eos_ids)
    return [
        "<end>" if i in ends else text
        for i, text in zip(ids, pair.tokenizer.pieces(ids), strict=True)
    ]


def _rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    # "or 0.0": a rounded -0.0 would show its sign.
    return [round(float(v), digits) or 0.0 for v in values]


def write_page(
    trajectories: list[dict[str, Any]],
    about: dict[str, Any],
    path: pathlib.Path,
) -> None:
    """Writes the page.

    Args:
      trajectories: of :func:`trajectories_of`, all batches.
      about: "title", and "facts", name -> text, shown at the top.
      path: of the HTML file.
    """
    pages.write("inspect.html", {"trajectories": trajectories}, path, **about)
