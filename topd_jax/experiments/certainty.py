"""How sure a student is of its errors, and when guidance then pays.

The derivation is in losses/README.md; the paper has none of it.
"""

import math
from typing import Any

import jax
import numpy as np
from scipy.optimize import brentq

from topd_jax.data.toy_world import truth
from topd_jax.experiments.observe import observe
from topd_jax.losses.fused import fused_map
from topd_jax.losses.log_probs import token_logprobs
from topd_jax.models.passes import trajectory_states
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.hosts import on_host
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup
from topd_jax.types import Trajectories

# Test problems on which the student's forks are looked at.
_PROBLEMS = 1000


def right_at_forks(settings: Settings, setup: Setup) -> dict[str, Any]:
    """Measure how sure the student is of its errors, at a run's start.

    At each fork of the student's rollouts: the probability that it gives to
    the teacher's most likely token. Where that is small, little of the
    gradient of reverse KL reaches the right token (losses/README.md).

    Args:
      settings: of a run in the tiny world.
      setup: of the run; its student completes the test problems.

    Returns:
      JSON-able: the number of "forks"; the "median", "low" and "high"
      (quartiles) of that probability, or None.
    """
    found = []
    for seen in observe(settings, setup, setup.student, _PROBLEMS, []):
        written = seen.trajectories
        labels = truth.label_batch(
            [r["prompt"] for r in seen.records],
            written.tokens, written.mask, setup.tokenizer, window=1,
        )  # fmt: skip
        teacher = setup.teachers[0].beside(setup.student)
        right = on_host(_right(setup.student, teacher, written))
        found.append(np.exp(right)[labels.token == truth.FORK])
    values = np.concatenate(found)
    names = {"low": 0.25, "median": 0.5, "high": 0.75}
    return {"forks": values.size} | {
        name: float(np.quantile(values, level)) if values.size else None
        for name, level in names.items()
    }


@jax.jit
def _right(student: Any, teacher: Any, trajectories: Trajectories) -> jax.Array:
    """Compute log p_S of the teacher's most likely token, f32[B, T]."""
    return fused_map(
        lambda own, frozen: token_logprobs(own, frozen.argmax(-1)),
        trajectory_states(student, trajectories), student.head,
        trajectory_states(teacher, trajectories.for_teacher), teacher.head,
    )  # fmt: skip


def pays_below(
    objective: Objective, *, tokens: float, right: float = 0.95
) -> float | None:
    """Predict where guidance pulls harder than reverse KL on a right token.

    Of two tokens at one fork, p the student's probability of the right one:
    reverse KL pulls on its logit by p (1 - p) (logit q - logit p) / N, cross
    entropy along a branch by lambda (1 - p) / (points K). They are equal
    where p (logit q - logit p) = lambda N / (points K).

    Args:
      objective: with guidance along the teacher's branches.
      tokens: N, of a row.
      right: q, the teacher's probability of the right token.

    Returns:
      p, 0..1; None without such guidance, or where nothing says how many
      points of a row have it.
    """
    if objective.guidance is None or not objective.trains_on_branch:
        return None
    ahead = objective.near_future
    points = objective.branches * (1 - ahead.percentile / 100)
    pull = objective.guidance.weight * tokens
    if ahead.threshold is not None or not points or not pull > 0:
        return None
    level = pull / (points * ahead.window)

    def excess(p: float) -> float:
        return p * (_log_odds(right) - _log_odds(p)) - level

    # The pull of reverse KL is greatest in between, and falls on both sides.
    grid = np.linspace(1e-6, right, 1000)
    peak = float(max(grid, key=excess))
    return peak if excess(peak) < 0 else float(brentq(excess, 1e-12, peak))


def _log_odds(p: float) -> float:
    return math.log(p) - math.log1p(-p)
