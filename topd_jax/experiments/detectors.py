"""How well the detector tells forks from surface form, where it is known.

Ours: the paper could not know. Candidates of a student's rollouts in the tiny
world are held against the truth labels of
:mod:`topd_jax.data.toy_world.truth`, once as
tokens (is this token the fork?) and once as windows (does the fork lie in the
K tokens that the detector looks at?). Tokens after a fork are left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

from topd_jax.data.toy_world import truth
from topd_jax.types import Annotations, Trajectories


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
    """Candidates whose truth is known; one entry each, [N].

    Attributes:
      distance: f32, transport distance of the two windows, 0..2.
      loss: f32, -log p_T(y_t), nats.
      divergent: bool, what the detector says.
      fork: bool, the candidate is the fork.
      window_fork: bool, the fork lies in the candidate's window.
      scores: name -> f32, what other detectors say; higher is more of a fork.
    """

    distance: np.ndarray
    loss: np.ndarray
    divergent: np.ndarray
    fork: np.ndarray
    window_fork: np.ndarray
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def judge(
    problems: list[str],
    trajectories: Trajectories,
    notes: Annotations,
    tokenizer: Any,
    *,
    window: int,
    scores: Mapping[str, np.ndarray] | None = None,
) -> Judged:
    """Holds the candidates of some rollouts against the truth.

    Args:
      problems: B problems of the tiny world.
      trajectories: the student's rollouts, B rows.
      notes: their annotations, with candidates.
      tokenizer: that wrote the tokens.
      window: K.
      scores: name -> f32[B, M] of other detectors, to be kept beside.

    Returns:
      The candidates that are not after a fork.
    """
    labels = truth.label_batch(
        problems,
        np.asarray(trajectories.tokens),
        np.asarray(trajectories.mask),
        tokenizer,
        window=window,
    )
    positions = np.asarray(notes.candidates.positions)

    def at(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(np.asarray(values), positions, axis=1)

    known = np.asarray(notes.candidates.mask) & (
        at(labels.token) != truth.AFTER
    )
    return Judged(
        distance=np.asarray(notes.distance)[known],
        loss=at(notes.teacher_token_loss)[known],
        divergent=np.asarray(notes.divergent)[known],
        fork=(at(labels.token) == truth.FORK)[known],
        window_fork=(at(labels.window) == truth.FORK)[known],
        scores={n: np.asarray(x)[known] for n, x in (scores or {}).items()},
    )


def concatenate(parts: list[Judged]) -> Judged:
    """All candidates of several batches."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the receiver operating characteristic.

    The probability that a positive scores above a negative, ties half
    (Hanley & McNeil, 1982).

    Args:
      score: f32[N].
      positive: bool[N].

    Returns:
      0..1; None where one of the classes is empty.
    """
    ones = int(positive.sum())
    zeros = positive.size - ones
    if not ones or not zeros:
        return None
    ranks = rankdata(score)
    return float(
        (ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)
    )


def report(judged: Judged) -> dict[str, Any]:
    """Precision, recall and AUC of the detector, of loss alone, of others.

    The others flag as many candidates as the detector does, those of their
    highest score, so that all are compared at one rate.

    Args:
      judged: candidates whose truth is known.

    Returns:
      JSON-able: for "fork" and "window_fork" the share of positives, and for
      "distance", "loss" and every other score the auc, precision and recall,
      0..1 or None.
    """
    flagged = int(judged.divergent.sum())
    scores = {"distance": judged.distance, "loss": judged.loss}
    scores |= judged.scores
    called = {name: _top(score, flagged) for name, score in scores.items()}
    called["distance"] = judged.divergent
    out: dict[str, Any] = {
        "candidates": int(judged.fork.size),
        "flagged": flagged,
    }
    for name in ("fork", "window_fork"):
        positive = getattr(judged, name)
        out[name] = {
            "share": float(positive.mean()) if positive.size else None,
        } | {
            by: {
                "auc": auc(score, positive),
                **_precision_recall(called[by], positive),
            }
            for by, score in scores.items()
        }
    return out


def _top(score: np.ndarray, count: int) -> np.ndarray:
    """bool[N]: the ``count`` highest, the earlier one among equals."""
    chosen = np.zeros(score.size, bool)
    chosen[np.argsort(-score, kind="stable")[:count]] = True
    return chosen


def _precision_recall(
    flagged: np.ndarray, positive: np.ndarray
) -> dict[str, float | None]:
    hits = int((flagged & positive).sum())
    return {
        "precision": hits / int(flagged.sum()) if flagged.any() else None,
        "recall": hits / int(positive.sum()) if positive.any() else None,
    }
