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
    "all": "All trajectories",
    "divergent": "With a divergent candidate",
    "alarm": "With a false alarm",
    "fork": "With a real fork",
    "missed": "With a fork the detector missed",
    "wrong": "Wrong answer",
    "right": "Right answer",
    "cut": "Cut off",
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
      (None where not known), "cut" and "tokens", each with "text", "loss"
      (nats), "truth" (None, or one of surface, fork, after) and "candidate":
      None or "distance", "divergent", "student" and "teacher" (the texts of
      the windows), "plan" (shares of each student token, rows sum to 1) and
      "window_truth" (is the fork in the window?).
    """
    written, (scored,) = seen.trajectories, seen.scored
    labels = seen.labels(setup.tokenizer, window) if is_world else None
    ids = [t[m].tolist() for t, m in zip(written.tokens, written.mask,
                                         strict=True)]  # fmt: skip
    grades = setup.grade(seen.records, [setup.tokenizer.decode(i) for i in ids])
    out = []
    for row, record in enumerate(seen.records):
        candidates = {
            int(scored.candidates.positions[row, slot]): _candidate(
                seen, setup, row, slot, labels
            )
            for slot in np.flatnonzero(scored.candidates.mask[row])
        }
        tokens = [
            {
                "text": text,
                "loss": round(float(scored.teacher_token_loss[row, at]), 4),
                "truth": labels and _TRUTH[int(labels.token[row, at])],
                "candidate": candidates.get(at),
            }
            for at, text in enumerate(_texts(setup, ids[row]))
        ]
        out.append(
            {
                "problem": record["prompt"],
                "reference": record["answer"],
                "right": None if grades is None else bool(grades[row]),
                "cut": bool(written.truncated[row]),
                "tokens": tokens,
            }
        )
    return out


def _candidate(
    seen: Observed, setup: Setup, row: int, slot: int, labels: Any
) -> dict[str, Any]:
    (scored,) = seen.scored
    at = scored.candidates.positions[row, slot]

    def window(windows: Windows) -> list[str]:
        exists = windows.mask[row, slot]
        return _texts(setup, windows.tokens[row, slot][exists].tolist())

    student = window(scored.student_windows)
    teacher = window(scored.teacher_windows)
    plan = scored.plan[row, slot][: len(student), : len(teacher)]
    return {
        "distance": round(float(scored.distance[row, slot]), 4),
        "divergent": bool(scored.divergent[row, slot]),
        "student": student,
        "teacher": teacher,
        "plan": (plan.astype(float) * len(student)).round(3).tolist(),
        "window_truth": labels and _TRUTH[int(labels.window[row, at])],
    }


def _texts(setup: Setup, ids: list[int]) -> list[str]:
    ends = set(setup.tokenizer.eos_ids)
    return [
        "<end>" if i in ends else text
        for i, text in zip(ids, setup.tokenizer.pieces(ids), strict=True)
    ]


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
    tokens = [token for row in trajectories for token in row["tokens"]]
    losses = sorted(token["loss"] for token in tokens)
    hidden: set[str] = set()
    if not any(token["truth"] for token in tokens):
        hidden |= {"fork", "missed"}
    if all(row["right"] is None for row in trajectories):
        hidden |= {"wrong", "right"}
    pages.write(
        "inspect.html", path,
        rows=[_article(row) for row in trajectories],
        # The loss of the darkest tokens; the highest ones stand out too far.
        top=max(losses[int(0.98 * len(losses))] if losses else 0, 1),
        filters={k: v for k, v in _FILTERS.items() if k not in hidden},
        **about,
    )  # fmt: skip


def _article(row: dict[str, Any]) -> dict[str, Any]:
    """Describe a trajectory to the template."""
    candidates = [t["candidate"] for t in row["tokens"] if t["candidate"]]
    divergent = [c for c in candidates if c["divergent"]]
    has_fork = any(t["truth"] == "fork" for t in row["tokens"])
    found = any(c["window_truth"] == "fork" for c in divergent)
    passes = {
        "all": True,
        "divergent": bool(divergent),
        "alarm": len(divergent) < len(candidates),
        "fork": has_fork,
        "missed": has_fork and not found,
        "right": row["right"] is True,
        "wrong": row["right"] is False,
        "cut": row["cut"],
    }
    return row | {
        "answer": row["reference"].split("####")[-1].strip(),
        "tokens": [_look(at, token) for at, token in enumerate(row["tokens"])],
        "keep": " ".join(name for name, on in passes.items() if on),
    }


def _look(at: int, token: dict[str, Any]) -> dict[str, Any]:
    """Describe the token at a position to the template."""
    truth, candidate = token["truth"], token["candidate"]
    marks = [truth] if truth in ("fork", "after") else []
    facts = [f"token {at}, loss {token['loss']:.3f} nats"]
    if truth:
        facts.append(f"truth: {_SAYS[truth]}")
    if candidate:
        kind = "divergent" if candidate["divergent"] else "false alarm"
        marks.append(kind.split()[-1])
        facts.append(f"{kind}, distance {candidate['distance']:.3f}")
        if truth:
            window = _IN_WINDOW[candidate["window_truth"]]
            facts.append(f"fork in its window: {window}")
    return token | {"marks": " ".join(marks), "tip": "\n".join(facts)}
