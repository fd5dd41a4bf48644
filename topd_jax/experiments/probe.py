"""Does a high loss mean that the futures diverge? (arXiv:2606.00305, §2.1)

Positions of a student's rollouts are chosen by high loss, at random and by
low loss. From each of them the teacher continues, and the transport distance
of the two windows is measured. The loss is the teacher's, -log p_T(y_t).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import pearsonr, spearmanr

from topd_jax.experiments import plots
from topd_jax.experiments.observe import Observed, looking_ahead, observe
from topd_jax.experiments.plots import Groups
from topd_jax.experiments.records import machine
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run

GROUPS = ("high", "random", "low")


def probe(
    settings: Settings, workdir: pathlib.Path, which: str, count: int
) -> dict[str, Any]:
    """Measure the distance of futures after high, random and low losses.

    Args:
      settings: of the run; its objective's number of candidates is chosen in
        each row, by each group's rule.
      workdir: of the run; ``probe-WHICH`` with ``probe.json`` and the picture
        is written there.
      which: "latest", "best" or "start".
      count: test prompts that the student completes; fewer where there are
        no more.

    Returns:
      JSON-able: what was measured, the numbers of :func:`report` and the
      "figure".

    Raises:
      ValueError: where there is no checkpoint, or no position to choose.
    """
    ahead = looking_ahead(settings)
    with open_run(settings, workdir, which) as (setup, student, step):
        objectives = ranked(ahead, setup.tokenizer.eos_ids)
        groups = collect(observe(settings, setup, student, count, objectives))
        prompts = len(setup.test.records[:count])
    folder = workdir / f"probe-{which}"
    result = {
        "machine": machine(),
        "seed": settings.seed,
        "step": step,
        "prompts": prompts,
        "window": ahead.near_future.window,
        **report(groups),
        "figure": str(folder / "probe.png"),
    }
    positions = jax.tree.map(lambda x: x.tolist(), groups)
    text = json.dumps(result | {"positions": positions}, indent=1)

    def write() -> None:
        plots.probe(groups, folder / "probe.png")
        (folder / "probe.json").write_text(text)

    hosts.from_first(write)
    return result


def ranked(ahead: Objective, eos_ids: tuple[int, ...]) -> list[Objective]:
    """Return an objective that chooses positions as each of :data:`GROUPS`.

    Args:
      ahead: that looks ahead.
      eos_ids: end-of-sequence ids.
    """
    return [
        dataclasses.replace(
            ahead,
            near_future=dataclasses.replace(
                ahead.near_future,
                ranking=functools.partial(
                    rank, group=group, window=ahead.near_future.window,
                    eos_ids=eos_ids,
                ),
                # Those of highest future loss would be no random ones.
                branch_fraction=1.0,
            ),
        )
        for group in GROUPS
    ]  # fmt: skip


def rank(
    teacher_token_loss: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    uniforms: jax.Array,
    *,
    group: str,
    window: int,
    eos_ids: tuple[int, ...],
) -> jax.Array:
    """Rank positions by high loss, at random, or by low loss.

    Args:
      teacher_token_loss: f32[B, T].
      tokens: i32[B, T].
      mask: bool[B, T].
      uniforms: f32[B, T] draws, which rank at random.
      group: one of :data:`GROUPS`.
      window: K. In truncated rows positions with fewer than K tokens after
        them are left out: the limit alone cuts their window short.
      eos_ids: end-of-sequence ids.

    Returns:
      f32[B, T], -inf where a position is left out.
    """
    score = {
        "high": teacher_token_loss,
        "random": uniforms,
        "low": -teacher_token_loss,
    }[group]
    truncated = mask[:, -1] & ~jnp.isin(tokens[:, -1], jnp.asarray(eos_ids))
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    short = lengths - jnp.arange(mask.shape[1]) < window
    return jnp.where(truncated[:, None] & short, -jnp.inf, score)


def collect(batches: Iterable[Observed]) -> dict[str, dict[str, np.ndarray]]:
    """Collect loss and distance of every chosen position.

    Args:
      batches: observed with the objectives of :func:`ranked`.

    Returns:
      group -> {"loss": f32[N], nats; "distance": f32[N], 0..2}.

    Raises:
      ValueError: where there is none.
    """
    parts: dict[str, list] = {g: [] for g in GROUPS}
    for batch in batches:
        for group, scored in zip(GROUPS, batch.scored, strict=True):
            used, at = scored.candidates.mask, scored.candidates.positions
            loss = np.take_along_axis(scored.teacher_token_loss, at, axis=1)
            parts[group].append(
                {"loss": loss[used], "distance": scored.distance[used]}
            )
    groups = {
        group: jax.tree.map(lambda *x: np.concatenate(x), *of_group)
        for group, of_group in parts.items()
    }
    if not groups["high"]["loss"].size:  # the others have as many
        raise ValueError(
            "every completion is cut off before a whole window; raise "
            "rollout.max_new_tokens or lower the objective's window"
        )
    return groups


def report(groups: Groups) -> dict[str, Any]:
    """Return the numbers of §2.1.

    Args:
      groups: of :func:`collect`.

    Returns:
      JSON-able: "count", "median", "quartiles" and "loss" (median) a group;
      "pearson" and "spearman" of loss and distance among the high-loss
      tokens, None where either does not vary; "false_alarm_fraction", the
      share of high-loss tokens below the upper quartile of the low-loss
      distances, with that "threshold".
    """

    def by_group(name: str, at: Any) -> dict[str, Any]:
        return {g: np.quantile(groups[g][name], at).tolist() for g in GROUPS}

    loss, distance = groups["high"]["loss"], groups["high"]["distance"]
    quartiles = by_group("distance", [0.25, 0.75])
    threshold = quartiles["low"][1]
    varied = loss.size > 2 and np.ptp(loss) > 0 and np.ptp(distance) > 0
    return {
        "count": {g: groups[g]["distance"].size for g in GROUPS},
        "median": by_group("distance", 0.5),
        "quartiles": quartiles,
        "loss": by_group("loss", 0.5),
        "pearson": float(pearsonr(loss, distance)[0]) if varied else None,
        "spearman": float(spearmanr(loss, distance)[0]) if varied else None,
        "false_alarm_fraction": float(np.mean(distance < threshold)),
        "threshold": threshold,
    }
