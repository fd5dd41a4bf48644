"""One HTML page that shows what the detector saw in a run's trajectories."""

import pathlib
from typing import Any

import numpy as np

from topd_jax.data.toy_world import truth
from topd_jax.experiments import pages
from topd_jax.experiments.observe import Observed
from topd_jax.training.setup import Setup
from topd_jax.types import Windows

_TRUTH = {truth.OK: "surface", truth.FORK: "fork", truth.AFTER: "after"}
_SAYS = {"surface": "surface form", "fork": "the fork",
         "after": "after the fork"}  # fmt: skip
_IN_WINDOW = {"fork": "yes", "surface": "no", "after": "before it"}
_FILTERS = {
    "divergent": "With a divergent candidate",
    "alarm": "With a false alarm",
}
_FILTERS_OF_TRUTH = {
    "fork": "With a real fork",
    "missed": "With a fork the detector missed",
}


def trajectories_of(
    seen: Observed, setup: Setup, *, window: int, is_world: bool
) -> list[dict[str, Any]]:
    """Gather what the page shows of a batch.

    Args:
      seen: the batch, scored with one objective.
      setup: of the run: its tokenizer and grader.
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
    written, (scored,) = seen.trajectories, seen.scored
    labels = None
    if is_world:
        labels = truth.label_batch(
            [r["prompt"] for r in seen.records],
            written.tokens, written.mask, setup.tokenizer, window=window,
        )  # fmt: skip
    ids = [t[m].tolist() for t, m in zip(written.tokens, written.mask,
                                         strict=True)]  # fmt: skip
    grades = setup.grade(seen.records, [setup.tokenizer.decode(i) for i in ids])
    out = []
    for row, record in enumerate(seen.records):
        known = labels and [_TRUTH[int(v)] for v in labels.token[row]]
        slots = np.flatnonzero(scored.candidates.mask[row])
        out.append(
            {
                "problem": record["prompt"],
                "reference": record["answer"],
                "right": None if grades is None else bool(grades[row]),
                "cut": bool(written.truncated[row]),
                "tokens": _texts(setup, ids[row]),
                "loss": _rounded(
                    scored.teacher_token_loss[row][: len(ids[row])]
                ),
                "truth": known and known[: len(ids[row])],
                "candidates": [
                    _candidate(seen, setup, row, slot, labels) for slot in slots
                ],
            }
        )
    return out


def _candidate(
    seen: Observed, setup: Setup, row: int, slot: int, labels: Any
) -> dict[str, Any]:
    (scored,) = seen.scored
    at = int(scored.candidates.positions[row, slot])

    def window(windows: Windows) -> list[str]:
        exists = windows.mask[row, slot]
        return _texts(setup, windows.tokens[row, slot][exists].tolist())

    student = window(scored.student_windows)
    teacher = window(scored.teacher_windows)
    plan = scored.plan[row, slot][: len(student), : len(teacher)]
    return {
        "at": at,
        "distance": round(float(scored.distance[row, slot]), 4),
        "divergent": bool(scored.divergent[row, slot]),
        "student": student,
        "teacher": teacher,
        "plan": [_rounded(line * len(student), 3) for line in plan],
        "truth": labels and _TRUTH[int(labels.token[row, at])],
        "window_truth": labels and _TRUTH[int(labels.window[row, at])],
    }


def _texts(setup: Setup, ids: list[int]) -> list[str]:
    ends = set(setup.tokenizer.eos_ids)
    return [
        "<end>" if i in ends else text
        for i, text in zip(ids, setup.tokenizer.pieces(ids), strict=True)
    ]


def _rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    # "or 0.0": a rounded -0.0 would show its sign.
    return [round(float(v), digits) or 0.0 for v in values]


def write_page(
    trajectories: list[dict[str, Any]],
    about: dict[str, Any],
    path: pathlib.Path,
) -> None:
    """Write the page.

    Args:
      trajectories: of :func:`trajectories_of`, all batches.
      about: "title", and "facts", name -> text, shown at the top.
      path: of the HTML file.
    """
    losses = sorted(loss for row in trajectories for loss in row["loss"])
    # The loss of the darkest tokens; the highest ones stand out too far.
    top = max(losses[int(0.98 * len(losses))] if losses else 0, 1)
    filters = {"all": "All trajectories", **_FILTERS}
    if any(row["truth"] for row in trajectories):
        filters |= _FILTERS_OF_TRUTH
    if any(row["right"] is not None for row in trajectories):
        filters |= {"wrong": "Wrong answer", "right": "Right answer"}
    candidates: list[dict[str, Any]] = []
    rows = [_article(row, top, candidates) for row in trajectories]
    pages.write(
        "inspect.html", path, rows=rows, candidates=candidates, top=top,
        filters=filters | {"cut": "Cut off"}, **about,
    )  # fmt: skip


def _article(
    row: dict[str, Any], top: float, candidates: list[dict[str, Any]]
) -> dict[str, Any]:
    """Describe a trajectory to the template; append its candidates."""
    by_position = {c["at"]: c for c in row["candidates"]}
    tokens = []
    for at, (text, loss) in enumerate(
        zip(row["tokens"], row["loss"], strict=True)
    ):
        truth = row["truth"] and row["truth"][at]
        marks = [truth] if truth in ("fork", "after") else []
        facts = [f"token {at}, loss {loss:.3f} nats"]
        if truth:
            facts.append(f"truth: {_SAYS[truth]}")
        candidate = by_position.get(at)
        if candidate:
            kind = "divergent" if candidate["divergent"] else "false alarm"
            marks += [kind.split()[-1]]
            facts.append(f"{kind}, distance {candidate['distance']:.3f}")
            if truth:
                window = _IN_WINDOW[candidate["window_truth"]]
                facts.append(f"fork in its window: {window}")
            candidates.append(candidate)
        tokens.append(
            {
                "text": text.replace("\n", "⏎\n"),
                "heat": f"{min(loss / top, 1):.3g}",
                "marks": " ".join(marks),
                "tip": "\n".join(facts),
                "candidate": len(candidates) - 1 if candidate else None,
            }
        )
    return {
        "problem": row["problem"],
        "right": row["right"],
        "answer": row["reference"].split("####")[-1].strip(),
        "cut": row["cut"],
        "tokens": tokens,
        "keep": " ".join(_passes(row)),
    }


def _passes(row: dict[str, Any]) -> list[str]:
    """Name the filters of the page that a trajectory passes."""
    divergent = [c for c in row["candidates"] if c["divergent"]]
    has_fork = "fork" in (row["truth"] or ())
    passes = {
        "all": True,
        "divergent": bool(divergent),
        "alarm": len(divergent) < len(row["candidates"]),
        "fork": has_fork,
        "missed": has_fork
        and all(c["window_truth"] != "fork" for c in divergent),
        "right": row["right"] is True,
        "wrong": row["right"] is False,
        "cut": row["cut"],
    }
    return [name for name, on in passes.items() if on]
