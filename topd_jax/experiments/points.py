"""Divergent points taken by themselves: a prefix, and the two futures.

What ``topd correct`` works on (arXiv:2606.00305, §5.2).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from topd_jax.experiments.observe import Observed
from topd_jax.types import Annotations, Prompts, Trajectories, Windows


class Points(NamedTuple):
    """N divergent points, each with what the correction needs of it.

    Attributes:
      prefix: N prompts of P columns: prompt and y_{<t}, padded on the left.
      ours: [N, K] what the student wrote from y_t on.
      theirs: [N, K] the teacher's continuation of the prefix.
      distance: f32[N] of the two windows, 0..2.
      plan: f32[N, K, K] their transport plan, student by teacher tokens.
    """

    prefix: Prompts
    ours: Windows
    theirs: Windows
    distance: np.ndarray
    plan: np.ndarray

    def one(self, index: int) -> "Points":
        """The point at ``index`` alone, N = 1."""
        return jax.tree.map(lambda x: x[index : index + 1], self)


def choose(batches: Iterable[Observed], count: int, pad_id: int) -> Points:
    """The divergent point of highest distance of each trajectory.

    A point whose student window was cut short by the limit alone is left out.

    Args:
      batches: observed; no more of them than needed are drawn.
      count: points, at least 1.
      pad_id: id of the padding.

    Returns:
      The first ``count`` points, or fewer where there are no more.

    Raises:
      ValueError: where no trajectory has a divergent point.
    """
    rows: list[tuple] = []
    seen_rows = 0
    for seen in batches:
        written, notes = seen.trajectories, seen.notes[0]
        at, window = notes.candidates.positions, notes.plan.shape[-1]
        length = written.mask.sum(axis=1, keepdims=True)
        short = written.truncated[:, None] & (at + window > length)
        usable = notes.divergent & ~short
        best = np.where(usable, notes.distance, -1.0).argmax(axis=1)
        for row in np.flatnonzero(usable.any(axis=1)):
            rows.append(_point(written, notes, row, best[row]))
        seen_rows += len(best)
        if len(rows) >= count:
            break
    if not rows:
        raise ValueError(
            f"none of {seen_rows} trajectories has a divergent point with a "
            "whole window behind it; lower objective.percentile, "
            "objective.threshold or objective.window"
        )
    prefixes, *rest = zip(*rows[:count], strict=True)
    width = max(len(p) for p in prefixes)
    tokens = np.full((len(prefixes), width), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, prefix in enumerate(prefixes):
        tokens[i, width - len(prefix) :] = prefix
        mask[i, width - len(prefix) :] = True
    return Points(Prompts(tokens, mask), *map(_stacked, rest))


def _point(
    written: Trajectories, notes: Annotations, row: int, slot: int
) -> tuple:
    """(prefix ids, windows, distance and plan) of one candidate."""
    end = notes.candidates.positions[row, slot]
    prompt = written.prompt[row][written.prompt_mask[row]]
    own = jax.tree.map(
        lambda x: x[row, slot],
        (notes.student_windows, notes.teacher_windows, notes.distance,
         notes.plan),
    )  # fmt: skip
    return np.concatenate([prompt, written.tokens[row, :end]]), *own


def _stacked(items: tuple) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *items)
