"""Does a high loss mean that the futures part? (arXiv:2606.00305, §2.1)

Positions of a student's rollouts are chosen by high loss, at random and by
low loss; from each, the teacher continues, and the transport distance of the
two windows is measured. The loss is the teacher's, -log p_T(y_t).
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.stats import pearsonr, spearmanr

from topd_jax.experiments.observe import Observed
from topd_jax.types import Trajectories

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUPS = ("high", "random", "low")
# METHOD §5: what the paper measured at K = 50 (§2.1).
PAPER = {
    "median": {"high": 0.566, "random": 0.361, "low": 0.315},
    "pearson": 0.126,
    "spearman": 0.143,
    "false_alarm_fraction": 0.2923,
}
_COLOURS = {"high": "#D55E00", "random": "#999999", "low": "#0072B2"}


def scores_for(window: int) -> tuple:
    """How each of :data:`GROUPS` ranks positions, for ``observe``.

    Args:
      window: K. In rows that were cut off, positions with fewer than K tokens
        after them are left out: their window is short by the limit alone.

    Returns:
      One (token_loss f32[B, T], trajectories, key) -> f32[B, T] a group.
    """

    def whole(score: jax.Array, written: Trajectories) -> jax.Array:
        length = jnp.sum(written.mask, axis=1, keepdims=True)
        behind = length - jnp.arange(score.shape[1])
        short = written.truncated[:, None] & (behind < window)
        return jnp.where(short, -jnp.inf, score)

    def high(loss: jax.Array, written: Trajectories, key: jax.Array) -> Any:
        return whole(loss, written)

    def lot(loss: jax.Array, written: Trajectories, key: jax.Array) -> Any:
        return whole(jax.random.uniform(key, loss.shape), written)

    def low(loss: jax.Array, written: Trajectories, key: jax.Array) -> Any:
        return whole(-loss, written)

    return high, lot, low


def collect(batches: Iterable[Observed]) -> dict[str, dict[str, np.ndarray]]:
    """Loss and distance of every position that was looked at.

    Args:
      batches: observed with the scores of :func:`scores_for`.

    Returns:
      group -> {"loss": f32[N], nats; "distance": f32[N], 0..2}.
    """
    parts: dict[str, dict[str, list]] = {
        g: {"loss": [], "distance": []} for g in GROUPS
    }
    for seen in batches:
        for group, notes in zip(GROUPS, seen.notes, strict=True):
            used = notes.candidates.mask
            loss = np.take_along_axis(
                notes.teacher_token_loss, notes.candidates.positions, axis=1
            )
            parts[group]["loss"].append(loss[used])
            parts[group]["distance"].append(notes.distance[used])
    return {
        g: {name: np.concatenate(v) for name, v in p.items()}
        for g, p in parts.items()
    }


def report(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The numbers of §2.1.

    Args:
      found: of :func:`collect`.

    Returns:
      JSON-able: "count", "median", "quartiles" and "loss" (median) a group;
      "pearson" and "spearman" of loss and distance among the high-loss
      tokens; "false_alarm_fraction", the share of high-loss tokens below the
      upper quartile of the low-loss distances, with that "threshold". A
      number that does not exist (no tokens, all alike) is None.
    """

    def quantiles(values: np.ndarray, *at: float) -> Any:
        if not values.size:
            return None
        some = [float(v) for v in np.quantile(values, at)]
        return some[0] if len(some) == 1 else some

    high, low = found["high"], found["low"]
    threshold = quantiles(low["distance"], 0.75)
    fraction = None
    if threshold is not None and high["distance"].size:
        fraction = float(np.mean(high["distance"] < threshold))
    varied = high["loss"].size > 2 and all(np.ptp(v) > 0 for v in high.values())
    pair = (high["loss"], high["distance"])
    return {
        "count": {g: int(found[g]["distance"].size) for g in GROUPS},
        "median": {g: quantiles(found[g]["distance"], 0.5) for g in GROUPS},
        "quartiles": {
            g: quantiles(found[g]["distance"], 0.25, 0.75) for g in GROUPS
        },
        "loss": {g: quantiles(found[g]["loss"], 0.5) for g in GROUPS},
        "pearson": float(pearsonr(*pair)[0]) if varied else None,
        "spearman": float(spearmanr(*pair)[0]) if varied else None,
        "false_alarm_fraction": fraction,
        "threshold": threshold,
    }


def table(numbers: Mapping[str, Any]) -> str:
    """The numbers beside the paper's, for a terminal.

    Args:
      numbers: of :func:`report`.
    """
    rows = [
        (f"median distance, {g} loss" if g != "random" else
         "median distance, at random", numbers["median"][g],
         PAPER["median"][g])
        for g in GROUPS
    ]  # fmt: skip
    rows += [
        ("Pearson, loss and distance", numbers["pearson"], PAPER["pearson"]),
        ("Spearman", numbers["spearman"], PAPER["spearman"]),
        ("false alarms among high loss", numbers["false_alarm_fraction"],
         PAPER["false_alarm_fraction"]),
    ]  # fmt: skip
    lines = [f"{'':30}{'here':>8}{'paper':>8}"]
    for name, here, paper in rows:
        shown = "–" if here is None else f"{here:.3f}"
        lines.append(f"{name:30}{shown:>8}{paper:>8.3f}")
    return "\n".join(lines)


def figures(
    found: Mapping[str, Mapping[str, np.ndarray]], folder: pathlib.Path
) -> dict[str, str]:
    """Figures 2, 4 and 6 of the paper, redrawn from these positions.

    2: distributions of distance by group; 4: the high-loss tokens against the
    low-loss quartile, with the false alarms; 6: loss against distance.

    Args:
      found: of :func:`collect`.
      folder: where the PNG files are written.

    Returns:
      name -> path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, draw in (
        ("figure2", _draw_groups),
        ("figure4", _draw_false_alarms),
        ("figure6", _draw_loss),
    ):
        figure, axis = plt.subplots(figsize=(6.2, 4.0), layout="constrained")
        draw(axis, found)
        axis.grid(alpha=0.3)
        path = folder / f"probe-{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        paths[name] = str(path)
    return paths


def _edges(found: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    top = max(
        (float(f["distance"].max()) for f in found.values()
         if f["distance"].size), default=1.0,
    )  # fmt: skip
    return np.linspace(0.0, max(top, 0.1), 31)


def _draw_groups(axis: Any, found: Mapping) -> None:
    for group in GROUPS:
        values = found[group]["distance"]
        if not values.size:
            continue
        counts, edges = np.histogram(values, _edges(found))
        axis.stairs(
            counts / values.size,
            edges,
            color=_COLOURS[group],
            linewidth=1.8,
            label=f"{group} ({values.size})",
        )
        axis.axvline(
            np.median(values),
            color=_COLOURS[group],
            linestyle=":",
            linewidth=1.5,
        )
    axis.set_xlabel("transport distance of the two futures (dotted: median)")
    axis.set_ylabel("share of positions")
    axis.legend(title="chosen by loss")


def _draw_false_alarms(axis: Any, found: Mapping) -> None:
    high, low = found["high"]["distance"], found["low"]["distance"]
    if high.size and low.size:
        threshold = np.quantile(low, 0.75)
        for below, label, colour in (
            (True, "false alarms", _COLOURS["low"]),
            (False, "futures part", _COLOURS["high"]),
        ):
            chosen = high[(high < threshold) == below]
            axis.hist(
                chosen,
                _edges(found),
                color=colour,
                alpha=0.75,
                label=f"{label} ({chosen.size / high.size:.0%})",
            )
        axis.axvline(
            threshold,
            color="black",
            linestyle="--",
            linewidth=1,
            label="upper quartile of low loss",
        )
        axis.legend()
    axis.set_xlabel("transport distance of high-loss tokens")
    axis.set_ylabel("tokens")


def _draw_loss(axis: Any, found: Mapping) -> None:
    for group in GROUPS:
        axis.scatter(
            found[group]["loss"],
            found[group]["distance"],
            s=9,
            alpha=0.45,
            linewidths=0,
            color=_COLOURS[group],
            label=group,
        )
    axis.set_xlabel("teacher token loss, −log p(y), nats")
    axis.set_ylabel("transport distance of the two futures")
    axis.legend(title="chosen by loss")
