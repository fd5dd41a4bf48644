"""Pictures of sweeps, of the probe and of local corrections.

Each function writes a PNG file and returns its path.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe & Ito: distinct for color-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
          "#000000")  # fmt: skip
_LINES = ("-", "--", "-.")
# Group or method -> name -> f32[N].
Groups = Mapping[str, Mapping[str, np.ndarray]]


def _figure(width: float, height: float, columns: int = 1) -> tuple:
    """Return (figure, its axes in one row) with a light grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, dpi=130)
    return path


def curves(
    rows: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> pathlib.Path:
    """Draw accuracy and reverse KL against steps, one line a variant.

    A line is the mean over seeds, with a band from the lowest to the highest.

    Args:
      rows: lines of a record; those with a "curve" are drawn, of many variants
        the first ones.
      path: of the PNG file.

    Returns:
      The path.
    """
    figure, axes = _figure(11, 4.2, columns=2)
    trained = [r for r in rows if "curve" in r]
    names = list(dict.fromkeys(r["name"] for r in trained))
    # More curves than colors and line styles cannot be told apart.
    styles = [(color, line) for line in _LINES for color in COLORS]
    for (color, line), name in zip(styles, names, strict=False):
        runs = [r["curve"] for r in trained if r["name"] == name]
        steps = [p["step"] for p in runs[0]]
        style = {"color": color, "linestyle": line, "marker": "."}
        for axis, key in zip(axes, ("exact_match", "reverse_kl"), strict=True):
            values = np.array([[p[key] for p in r] for r in runs], dtype=float)
            axis.plot(steps, values.mean(0), label=name, **style)
            band = (values.min(0), values.max(0))
            axis.fill_between(steps, *band, color=color, alpha=0.15)
    axes[0].set(xlabel="step", ylabel="exact match, validation")
    axes[1].set(xlabel="step", ylabel="reverse KL, validation (nats a token)")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    return _save(figure, path)


def gains(
    by_world: Mapping[str, Mapping[str, Any]],
    path: pathlib.Path,
    *,
    below: float | None,
) -> pathlib.Path:
    """Draw gains over OPD against how sure the student is of its errors.

    Losses of more than 0.25 are below its edge.

    Args:
      by_world: world -> :func:`~topd_jax.experiments.sweep_report.summarize`;
        those where no fork was measured are left out.
      path: of the PNG file.
      below: a probability to mark, of
        :func:`~topd_jax.experiments.certainty.pays_below`.

    Returns:
      The path.
    """
    figure, (axis,) = _figure(9, 7.5)
    points: dict[str, list[tuple[float, ...]]] = {}
    for summary in by_world.values():
        certainty = (summary["right_at_forks"] or {}).get("median")
        for variant in summary["variants"]:
            if certainty and "gain" in variant:
                low, high = variant["gain_interval"]
                points.setdefault(variant["name"], []).append(
                    (certainty, variant["gain"], low, high)
                )
    for i, (name, measured) in enumerate(points.items()):
        x, gain, low, high = np.array(sorted(measured)).T
        # Side by side, so that intervals can be told apart.
        x = x * 1.04 ** (i - len(points) / 2)
        line = _LINES[i // len(COLORS) % len(_LINES)]
        axis.errorbar(
            x, gain, (gain - low, high - gain), label=name, capsize=2,
            marker=".", linestyle=line, color=COLORS[i % len(COLORS)],
        )  # fmt: skip
    axis.axhline(0.0, color=COLORS[-1], linewidth=0.8)
    if below is not None:
        label = "predicted: left of it, guidance pulls harder"
        axis.axvline(below, color=COLORS[-1], linestyle=":", label=label)
    axis.set_xscale("log")
    axis.set(
        xlabel="student's probability of the right token at forks (median)"
    )
    axis.set(ylabel="exact match minus that of OPD (95 %)")
    if points:
        # What ends far below would flatten all others.
        axis.set_ylim(bottom=max(axis.get_ylim()[0], -0.25))
        figure.legend(loc="outside lower center", fontsize=8)
    return _save(figure, path)


def probe(groups: Groups, path: pathlib.Path) -> pathlib.Path:
    """Redraw figures 2, 4 and 6 of the paper, side by side.

    Left: distances by group with their medians, and the upper quartile of low
    loss, below which high losses are false alarms. Right: loss and distance.

    Args:
      groups: of :func:`topd_jax.experiments.probe.collect`.
      path: of the PNG file.

    Returns:
      The path.
    """
    figure, (left, right) = _figure(12, 4.2, columns=2)
    edges = np.linspace(0.0, 2.0, 61)
    for color, (name, values) in zip(COLORS, groups.items(), strict=False):
        distance = values["distance"]
        style = {"color": color, "label": f"{name} ({distance.size})"}
        right.scatter(values["loss"], distance, s=9, alpha=0.45, **style)
        counts, _ = np.histogram(distance, edges)
        left.stairs(counts / distance.size, edges, **style)
        left.axvline(np.median(distance), color=color, linestyle=":")
    quartile = np.quantile(groups["low"]["distance"], 0.75)
    label = "upper quartile of low loss"
    left.axvline(quartile, color=COLORS[-1], linestyle="--", label=label)
    left.legend()
    left.set(xlabel="transport distance of the two futures (dotted: median)")
    left.set(ylabel="share of positions")
    right.set(xlabel="teacher token loss, −log p(y), nats")
    right.set(ylabel="transport distance of the two futures")
    right.legend(title="chosen by loss")
    return _save(figure, path)


def corrections(measured: Groups, path: pathlib.Path) -> pathlib.Path:
    """Redraw figure 5 of the paper: distances before and after correction.

    A box holds half of the prefixes, with its median; a diamond is the mean.

    Args:
      measured: method -> {"distance": f32[N]}, in the order of drawing.
      path: of the PNG file.

    Returns:
      The path.
    """
    figure, (axis,) = _figure(6.8, 4.2)
    distances = [values["distance"] for values in measured.values()]
    axis.boxplot(
        distances, tick_labels=list(measured), showmeans=True,
        meanprops={"marker": "D"},
    )  # fmt: skip
    axis.set_ylabel("transport distance to the teacher's continuation")
    return _save(figure, path)
