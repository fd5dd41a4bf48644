"""Pictures of a sweep and of a local correction."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe & Ito: told apart by every reader, and in print.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)


def curves(
    rows: Sequence[dict[str, Any]],
    titles: Mapping[str, str],
    folder: pathlib.Path,
) -> pathlib.Path:
    """Accuracy and reverse KL against steps, one line a variant.

    Args:
      rows: lines of a record; those with a "curve" are drawn (of many, those
        with a title), the mean over seeds with a band from lowest to highest.
      titles: name -> text of the legend.
      folder: where ``curves.png`` is written.

    Returns:
      The picture's path.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    drawn = [r for r in rows if "curve" in r]
    names = list(dict.fromkeys(r["name"] for r in drawn))
    if len(names) > 2 * len(COLOURS):  # nobody could tell them apart
        names = [n for n in names if n in titles]
    looks = [(c, line) for line in ("-", "--") for c in COLOURS]
    for (colour, line), name in zip(looks, names, strict=False):
        runs = [r["curve"] for r in drawn if r["name"] == name]
        steps = [p["step"] for p in runs[0]]
        for axis, key in zip(axes, ("exact_match", "reverse_kl"), strict=True):
            values = np.array(
                [[p[key] for p in run] for run in runs], dtype=float
            )
            axis.plot(
                steps,
                values.mean(0),
                color=colour,
                linestyle=line,
                marker="o",
                markersize=3,
                label=titles.get(name, name),
            )
            if len(runs) > 1:
                axis.fill_between(
                    steps,
                    values.min(0),
                    values.max(0),
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
    for axis, label in zip(
        axes,
        ("exact match, validation", "reverse KL (nats a token), validation"),
        strict=True,
    ):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")  # it falls thirtyfold
    axes[0].legend(fontsize=8)
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def gains(
    variants: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> pathlib.Path:
    """Gain over the baseline with its interval, one line a variant.

    Args:
      variants: those with "title", "gain" and "gain_interval" are drawn, best
        first.
      folder: where ``gains.png`` is written.

    Returns:
      The picture's path.
    """
    drawn = sorted(
        (v for v in variants if "gain" in v), key=lambda v: v["gain"]
    )
    figure = Figure(figsize=(8.6, 1.4 + 0.22 * len(drawn)),
                    layout="constrained")  # fmt: skip
    axis = figure.subplots()
    for i, v in enumerate(drawn):
        low, high = v["gain_interval"]
        clear = COLOURS[1] if v["p"] < 0.05 else COLOURS[0]
        axis.plot([low, high], [i, i], color=clear, linewidth=1.4)
        axis.plot(v["gain"], i, "o", color=clear, markersize=4)
    axis.axvline(0, color="#000000", linewidth=0.8)
    axis.set_yticks(range(len(drawn)), [v["title"] for v in drawn], fontsize=8)
    axis.set_ylim(-0.7, len(drawn) - 0.3)
    axis.set_xlabel(
        "gain over OPD in exact match, 95 % interval (orange: p < 0.05 after "
        "Holm)"
    )
    axis.grid(alpha=0.3)
    path = folder / "gains.png"
    figure.savefig(path, dpi=130)
    return path


def distances(
    found: Sequence[dict[str, Any]], folder: pathlib.Path
) -> pathlib.Path:
    """How far apart the futures are, where the truth is known.

    Args:
      found: "detector" entries of a record, one a seed.
      folder: where ``distances.png`` is written.

    Returns:
      The picture's path.
    """
    edges = np.array(found[0]["histogram"]["edges"])
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for key, label, colour in (
        ("surface", "surface form only", COLOURS[5]),
        ("fork", "a reasoning fork in the window", COLOURS[1]),
    ):
        counts = np.sum([f["histogram"][key] for f in found], axis=0)
        axis.stairs(counts, edges, fill=True, alpha=0.55, color=colour,
                    label=f"{label} ({counts.sum()})")  # fmt: skip
    axis.set_xlabel("transport distance of the two futures")
    axis.set_ylabel("candidates")
    axis.legend()
    axis.grid(alpha=0.3)
    path = folder / "distances.png"
    figure.savefig(path, dpi=130)
    return path


def corrections(
    found: Mapping[str, Mapping[str, np.ndarray]],
    numbers: Mapping[str, Mapping[str, Any]],
    paper: Mapping[str, float],
    folder: pathlib.Path,
) -> pathlib.Path:
    """Figure 5 of the paper redrawn: distances before and after correction.

    A box holds half of the prefixes and has its median drawn; every prefix is
    a dot.

    Args:
      found: method -> {"distance": f32[N]}, in the order of drawing.
      numbers: method -> {"mean", "interval"}.
      paper: method -> the paper's mean, for some of them.
      folder: where ``correction-figure5.png`` is written.

    Returns:
      The picture's path.
    """
    names = list(found)
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axis = figure.subplots()
    boxes = axis.boxplot(
        [found[n]["distance"] for n in names],
        positions=range(len(names)),
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "#000000"},
    )
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        colour = COLOURS[i]
        boxes["boxes"][i].set(facecolor=colour, alpha=0.35)
        values = found[name]["distance"]
        axis.scatter(i + rng.uniform(-0.2, 0.2, values.size), values, s=5,
                     color=colour, alpha=0.35, linewidths=0)  # fmt: skip
        low, high = numbers[name]["interval"]
        mean = numbers[name]["mean"]
        axis.errorbar(i + 0.34, mean, [[mean - low], [high - mean]], fmt="D",
                      color=colour, markersize=5, capsize=3,
                      label=f"{name}: mean {mean:.3f}")  # fmt: skip
        if name in paper:
            axis.hlines(paper[name], i - 0.3, i + 0.3, color="#000000",
                        linestyle=":", linewidth=1.4)  # fmt: skip
    axis.plot([], [], ":", color="#000000", label="the paper's mean")
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.6, len(names) - 0.3)
    axis.set_ylabel("transport distance to the teacher's continuation")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "correction-figure5.png"
    figure.savefig(path, dpi=130)
    return path
