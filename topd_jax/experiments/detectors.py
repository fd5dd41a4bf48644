"""Detectors of forks, and the student at forks, by the tiny world's truth.

The paper could not measure this: in the tiny world it is known for every
token whether the student disagrees with the teacher in surface form alone or
forks off the reasoning (:mod:`topd_jax.data.toy_world.truth`). Candidates of
the student's rollouts are compared with the truth as tokens (is this token
the fork?) and as windows (does the fork lie in the K tokens that the detector
looks at?). Tokens after a fork are left out. How sure the student is of its
errors is the probability that it gives to the right token at a fork.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import mannwhitneyu

from topd_jax.data.toy_world import truth
from topd_jax.experiments.observe import Observed, looking_ahead, observe
from topd_jax.losses.fused import fused_map
from topd_jax.losses.log_probs import token_logprobs
from topd_jax.losses.near_future import future_loss
from topd_jax.models.passes import trajectory_states
from topd_jax.parallel.hosts import on_host
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup
from topd_jax.types import Trajectories

# Test problems that detectors are measured on.
_PROBLEMS = 1000


class LabeledCandidates(NamedTuple):
    """Candidates whose truth is known, N of them.

    Attributes:
      distance: f32[N], transport distance of the two windows, 0..2.
      loss: f32[N], -log p_T(y_t), nats.
      future_loss: f32[N], its mean over the window, nats a token.
      divergent: bool[N], what the objective's detector decided.
      fork: bool[N], the candidate is the fork.
      window_fork: bool[N], the fork lies in the candidate's window.
    """

    distance: np.ndarray
    loss: np.ndarray
    future_loss: np.ndarray
    divergent: np.ndarray
    fork: np.ndarray
    window_fork: np.ndarray


def label_candidates(
    seen: Observed, labels: truth.TruthLabels, *, window: int
) -> LabeledCandidates:
    """Label the candidates of some rollouts with the truth.

    Args:
      seen: rollouts on problems of the tiny world, scored with one objective
        that looks ahead.
      labels: of the rollouts, with windows of K tokens.
      window: K.

    Returns:
      The candidates that do not come after a fork.
    """
    written, (scored,) = seen.trajectories, seen.scored
    candidates, loss = scored.candidates, scored.teacher_token_loss

    def at_candidates(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, candidates.positions, axis=1)

    token_labels = at_candidates(labels.token)
    values = LabeledCandidates(
        distance=scored.distance,
        loss=at_candidates(loss),
        future_loss=future_loss(loss, written.mask, candidates, length=window),
        divergent=scored.divergent,
        fork=token_labels == truth.FORK,
        window_fork=at_candidates(labels.window) == truth.FORK,
    )
    known = candidates.mask & (token_labels != truth.AFTER)
    return jax.tree.map(lambda x: np.asarray(x)[known], values)


def auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the area under the receiver operating characteristic.

    The probability that a positive scores above a negative, ties half
    (Hanley & McNeil, 1982): the Mann-Whitney U of the positives over the
    number of pairs.

    Args:
      score: f32[N].
      positive: bool[N].

    Returns:
      0..1; None where one of the classes is empty.
    """
    if positive.all() or not positive.any():
        return None
    score = score.astype(float)  # ranks add up beyond float32
    above, below = score[positive], score[~positive]
    u = mannwhitneyu(above, below, method="asymptotic").statistic
    return float(u / (above.size * below.size))


def report(candidates: LabeledCandidates) -> dict[str, Any]:
    """Return AUC, precision and recall of each detector.

    The losses flag as many candidates as the transport distance does, those
    of the highest loss, so that all are compared at one rate.

    Args:
      candidates: whose truth is known.

    Returns:
      JSON-able: the number of "candidates" and of those "flagged"; for "fork"
      and "window_fork" the "share" of positives, and for "distance", "loss"
      and "future_loss" the "auc", "precision" and "recall", 0..1 or None.
    """
    count = int(candidates.divergent.sum())
    flagged = {
        "distance": candidates.divergent,
        "loss": _highest(candidates.loss, count),
        "future_loss": _highest(candidates.future_loss, count),
    }
    numbers = {"candidates": candidates.fork.size, "flagged": count}
    for target in ("fork", "window_fork"):
        positive = getattr(candidates, target)
        numbers[target] = {"share": _share(positive)} | {
            name: {
                "auc": auc(getattr(candidates, name), positive),
                "precision": _share(positive[of_name]),
                "recall": _share(of_name[positive]),
            }
            for name, of_name in flagged.items()
        }
    return numbers


def _highest(score: np.ndarray, count: int) -> np.ndarray:
    """Return bool[N]: the ``count`` highest, the earlier one among equals."""
    chosen = np.zeros(score.size, bool)
    chosen[np.argsort(-score, kind="stable")[:count]] = True
    return chosen


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def measure_forks(settings: Settings, setup: Setup) -> dict[str, Any]:
    """Measure detectors, and how sure the student of a run's start errs.

    Where the student gives the teacher's most likely token at a fork a small
    probability, little of the gradient of reverse KL reaches the right token
    (losses/README.md).

    Args:
      settings: of a run in the tiny world.
      setup: of the run; its student completes the test problems.

    Returns:
      JSON-able: "detector", the numbers of :func:`report`; "right_at_forks",
      the number of "forks" and the "median", "low" and "high" (quartiles) of
      that probability, or None.
    """
    ahead = looking_ahead(settings)
    window = ahead.near_future.window
    teacher = setup.teachers[0].beside(setup.student)
    parts, found = [], []
    for seen in observe(settings, setup, setup.student, _PROBLEMS, [ahead]):
        labels = seen.labels(setup.tokenizer, window)
        parts.append(label_candidates(seen, labels, window=window))
        right = on_host(_right(setup.student, teacher, seen.trajectories))
        found.append(np.exp(right)[labels.token == truth.FORK])
    values = np.concatenate(found)
    names = {"low": 0.25, "median": 0.5, "high": 0.75}
    quartiles = {
        name: float(np.quantile(values, level)) if values.size else None
        for name, level in names.items()
    }
    return {
        "detector": report(jax.tree.map(lambda *x: np.concatenate(x), *parts)),
        "right_at_forks": {"forks": values.size} | quartiles,
    }


@jax.jit
def _right(student: Any, teacher: Any, trajectories: Trajectories) -> jax.Array:
    """Compute log p_S of the teacher's most likely token, f32[B, T]."""
    return fused_map(
        lambda own, frozen: token_logprobs(own, frozen.argmax(-1)),
        trajectory_states(student, trajectories), student.head,
        trajectory_states(teacher, trajectories.for_teacher), teacher.head,
    )  # fmt: skip
