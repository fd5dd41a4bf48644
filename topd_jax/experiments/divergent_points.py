"""Divergent points cut out of trajectories: a prefix and the two futures.

What ``topd correct`` works on (arXiv:2606.00305, §5.2).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from topd_jax.data.prompts import pad_prompts
from topd_jax.experiments.observe import Observed
from topd_jax.types import Prompts, Windows


class Points(NamedTuple):
    """N divergent points, each with what its correction needs.

    Attributes:
      prefix: N prompts of P columns: prompt and y_{<t}, padded on the left.
      student: [N, K] the student's tokens from y_t on.
      teacher: [N, K] the teacher's continuation of the prefix.
      distance: f32[N] of the two windows, 0..2.
      plan: f32[N, K, K] their transport plan, student by teacher tokens.
    """

    prefix: Prompts
    student: Windows
    teacher: Windows
    distance: np.ndarray
    plan: np.ndarray


def choose(batches: Iterable[Observed], count: int, pad_id: int) -> Points:
    """Choose the divergent point of highest distance of each trajectory.

    A point whose student window is cut short by the limit alone is left out.

    Args:
      batches: observed; no more of them than needed are drawn.
      count: points, at least 1.
      pad_id: id of the padding.

    Returns:
      The first ``count`` points, or fewer where there are no more.

    Raises:
      ValueError: where no trajectory has a divergent point.
    """
    points: list[tuple] = []
    trajectories = 0
    for batch in batches:
        written, (scored,) = batch.trajectories, batch.scored
        positions, window = scored.candidates.positions, scored.plan.shape[-1]
        lengths = written.mask.sum(axis=1, keepdims=True)
        short = written.truncated[:, None] & (positions + window > lengths)
        usable = scored.divergent & ~short
        best = np.where(usable, scored.distance, -1.0).argmax(axis=1)
        for row in np.flatnonzero(usable.any(axis=1)):
            points.append(_point(batch, row, best[row]))
        trajectories += len(best)
        if len(points) >= count:
            break
    if not points:
        raise ValueError(
            f"none of {trajectories} trajectories has a divergent point with a "
            "whole window behind it; lower the objective's percentile, "
            "threshold or window"
        )
    prefixes, *rest = zip(*points[:count], strict=True)
    width = max(map(len, prefixes))
    stacked = (jax.tree.map(lambda *x: np.stack(x), *part) for part in rest)
    return Points(pad_prompts(prefixes, pad_id=pad_id, width=width), *stacked)


def _point(batch: Observed, row: int, slot: int) -> tuple[Any, ...]:
    """Return (prefix ids, windows, distance and plan) of one candidate."""
    written, (scored,) = batch.trajectories, batch.scored
    end = scored.candidates.positions[row, slot]
    prompt = written.prompt[row][written.prompt_mask[row]]
    of_slot = jax.tree.map(
        lambda x: x[row, slot],
        (scored.student_windows, scored.teacher_windows, scored.distance,
         scored.plan),
    )  # fmt: skip
    return np.concatenate([prompt, written.tokens[row, :end]]), *of_slot
