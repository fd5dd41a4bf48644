"""The exponents of growth beside those of the formulas: table and picture."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullLocator,
)

from topd_jax.experiments.plots import COLOURS
from topd_jax.planning.chips import Chip

# A surprise: so much faster than the formula, from one doubling to the next.
SURPRISE = 0.5
# Less than this is what a program of any size has, or too short to time.
_LEAST = {"flops": 1e4, "bytes": 1e6, "temporaries": 4e6, "sent": 1e4,
          "seconds": 1e-3}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rate:
    """How one quantity of one phase grows with one size.

    Attributes:
      varied: what is doubled, "T".
      phase: "decode", say.
      quantity: flops, bytes, temporaries, sent or seconds.
      sizes: of what is doubled.
      values: the quantity at each.
      exponents: log2 of the ratio, one a doubling; nan where it is too small
        to tell.
      formula: the same of the formula.
    """

    varied: str
    phase: str
    quantity: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    exponents: tuple[float, ...]
    formula: tuple[float, ...]

    @property
    def excess(self) -> float:
        """The most that a doubling exceeds its formula; nan: unknown."""
        gaps = [
            a - b
            for a, b in zip(self.exponents, self.formula, strict=True)
            if not math.isnan(a - b)
        ]
        return max(gaps, default=math.nan)

    @property
    def surprising(self) -> bool:
        """Whether it grows half a power faster than it should."""
        return self.excess >= SURPRISE


def rates(rows: Sequence[dict[str, Any]], chip: Chip) -> list[Rate]:
    """The growth that a record shows.

    Args:
      rows: of one target.
      chip: whose figures turn the formula's work into seconds.

    Returns:
      One a size, phase and quantity, in the order of the record.
    """
    found = []
    for varied in dict.fromkeys(r["varied"] for r in rows):
        own = [r for r in rows if r["varied"] == varied]
        own = sorted(own, key=lambda r: r["size"])
        sizes = tuple(r["size"] for r in own)
        for phase in own[0]["phases"]:
            for quantity in _LEAST:
                values = _values(own, phase, quantity)
                if values is None:
                    continue
                wanted = tuple(_wanted(r, phase, quantity, chip) for r in own)
                powers = _exponents(values, _LEAST[quantity])
                named = (varied, phase, quantity, sizes, values)
                found.append(Rate(*named, powers, _exponents(wanted, 0.0)))
    return found


def _values(
    rows: Sequence[dict[str, Any]], phase: str, quantity: str
) -> tuple[float, ...] | None:
    kind = [r["phases"][phase] for r in rows]
    if quantity == "seconds":
        if not all(phase in r.get("seconds", {}) for r in rows):
            return None
        return tuple(r["seconds"][phase] for r in rows)
    return tuple(k[quantity] for k in kind)


def _wanted(
    row: dict[str, Any], phase: str, quantity: str, chip: Chip
) -> float:
    work = row["formula"][phase]
    if quantity == "seconds":
        # Neither hides behind the other on a CPU.
        return work["flops"] / chip.flops + work["bytes"] / chip.bandwidth
    return work[quantity]


def _exponents(values: Sequence[float], least: float) -> tuple[float, ...]:
    return tuple(
        math.log2(b / a) if a > least and b > least else math.nan
        for a, b in itertools.pairwise(values)
    )


def table(found: Sequence[Rate]) -> str:
    """The last doubling of each, beside its formula; then the surprises.

    Args:
      found: of :func:`rates`.

    Returns:
      A Markdown table.
    """
    kinds = [q for q in _LEAST if any(r.quantity == q for r in found)]
    lines = [
        f"| doubled | phase | {' | '.join(kinds)} |",
        "|---" * (2 + len(kinds)) + "|",
    ]
    cells = {(r.varied, r.phase, r.quantity): r for r in found}
    for varied, phase in dict.fromkeys((r.varied, r.phase) for r in found):
        row = [_cell(cells.get((varied, phase, q))) for q in kinds]
        if set(row) != {""}:
            lines.append(f"| {varied} | {phase} | {' | '.join(row)} |")
    lines += ["", "measured (formula) exponent of the last doubling"]
    odd = [r for r in found if r.surprising]
    for r in odd:
        pairs = ", ".join(
            f"{a:.2f} ({b:.2f})"
            for a, b in zip(r.exponents, r.formula, strict=True)
        )
        where = f"{r.quantity} of {r.phase} in {r.varied}"
        lines.append(f"surprise: {where}: {pairs}")
    if not odd:
        lines.append(f"nothing grows {SURPRISE} faster than its formula")
    return "\n".join(lines)


def _cell(rate: Rate | None) -> str:
    if rate is None or not rate.exponents or math.isnan(rate.exponents[-1]):
        return ""
    mark = "**" if rate.surprising else ""
    wanted = rate.formula[-1]
    beside = "" if math.isnan(wanted) else f" ({wanted:.2f})"
    return f"{mark}{rate.exponents[-1]:.2f}{mark}{beside}"


def draw(
    rows: Sequence[dict[str, Any]], chip: Chip, path: pathlib.Path
) -> None:
    """Each quantity against each size, of every phase, over the base's.

    Args:
      rows: of one target.
      chip: see :func:`rates`.
      path: of the picture; the formula is dotted.
    """
    found = rates(rows, chip)
    names = list(dict.fromkeys(r.varied for r in found))
    phases = list(dict.fromkeys(r.phase for r in found))
    found = [r for r in found if min(r.values) > 0 and not math.isnan(r.excess)]
    kinds = [q for q in _LEAST if any(r.quantity == q for r in found)]
    figure = Figure(
        figsize=(2.2 * len(names), 2.0 * len(kinds)), layout="constrained"
    )
    axes = figure.subplots(len(kinds), len(names), squeeze=False)
    for rate in found:
        axis = axes[kinds.index(rate.quantity), names.index(rate.varied)]
        colour = COLOURS[phases.index(rate.phase)]
        wanted = [1.0]
        for exponent in rate.formula:
            wanted.append(wanted[-1] * 2.0**exponent)
        measured = [v / rate.values[0] for v in rate.values]
        axis.loglog(
            rate.sizes, measured, color=colour, marker="o", markersize=3,
            label=rate.phase,
        )  # fmt: skip
        axis.loglog(rate.sizes, wanted, color=colour, linestyle=":")
    for row, kind in zip(axes, kinds, strict=True):
        row[0].set_ylabel(f"{kind}, of the base")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        for above in axes[:, names.index(name)]:
            _label(above, next(r.sizes for r in found if r.varied == name))
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(
            *axis.get_legend_handles_labels(), strict=True
        ):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside upper center",
        ncols=len(handles), frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def _label(axis: Axes, sizes: Sequence[float]) -> None:
    """Plain numbers on both axes; a panel with no line says why."""
    axis.grid(alpha=0.3)
    if not axis.lines:
        axis.set_axis_off()
        axis.text(
            0.5, 0.5, "too small to tell", ha="center", va="center",
            transform=axis.transAxes, color="gray",
        )  # fmt: skip
        return
    low, high = axis.get_ylim()
    if high < 1.5 * low:  # flat: the noise would fill the panel
        axis.set_ylim(min(low, 0.7), max(high, 1.4))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.yaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axis.xaxis.set_major_locator(FixedLocator(sizes[::2]))
