"""At which certainty of a student guidance begins to pay.

The derivation is in losses/README.md; the paper has none of it.
"""

import math

import numpy as np
from scipy.optimize import brentq

from topd_jax.objectives.objective import Objective


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
