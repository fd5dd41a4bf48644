"""Learning curves of runs, drawn by plotly in the reader's browser."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.io

from topd_jax.experiments.pages import number, number_text, range_text
from topd_jax.experiments.run_records import RunRecords

# Metric -> title and unit; every other metric has a chart below the fold.
_CHARTS = {
    "loss": ("Loss", "nats a token"),
    "exact_match": ("Right answers", "share, 95 % interval"),
    "reverse_kl": ("Reverse KL", "nats a token"),
    "distance": ("Transport distance of windows", "0 to 2"),
    "guidance": ("Guidance loss", "nats a token"),
    "length_mean": ("Length of completions", "tokens, mean"),
    "truncated": ("Cut off at the limit", "share"),
    "student_entropy": ("Entropy of the student", "nats a token"),
    "top_k_overlap": ("Overlap of the top k", "share"),
    "grad_norm": ("Norm of the gradient", "before clipping"),
    "seconds_rollout": ("Rollout", "seconds, in timed steps"),
    "seconds_score": ("Scoring", "seconds, in timed steps"),
    "seconds_update": ("Update", "seconds, in timed steps"),
    "rate_tokens": ("Speed", "tokens a second"),
}
# Constants, and the ends of an interval.
_NOT_DRAWN = {"step", "final", "temperature", "problems", "correct",
              "exact_match_low", "exact_match_high"}  # fmt: skip
# Each has a contrast of at least 3 on white and on a dark card.
_COLORS = ("#2385c9", "#d4640f", "#11926a", "#c9579d", "#94801a", "#8468dd")
_LOOKS = {
    "training": {"mode": "lines"},
    "validation": {"mode": "lines+markers", "line": {"dash": "dash"},
                   "marker": {"size": 5}},
    "test": {"mode": "markers",
             "marker": {"size": 8, "symbol": "circle-open"}},
}  # fmt: skip
_NAME = 30  # letters of a legend


def curves_of(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Chart every number that was logged.

    Args:
      runs: one, or several to lay over each other.

    Returns:
      For each chart "title", "unit", "more" (whether it stands below the fold)
      and "traces", plotly's: a line for each run, teacher and kind (training,
      validation, test). Values that are missing or not finite are None.
    """
    lines: dict[str, list[tuple]] = {}
    for run in runs:
        kinds = {
            "training": run.metrics,
            "validation": [r for r in run.evals if not r.get("final")],
            "test": [r for r in run.evals if r.get("final")],
        }
        for kind, rows in kinds.items():
            for key in sorted({key for row in rows for key in row}):
                name, _, teacher = key.partition("/")
                parts = [run.name if len(runs) > 1 else "", teacher]
                label = ", ".join(filter(None, parts))
                values = _values([r for r in rows if key in r], key)
                if any(value is not None for value in values["y"]):
                    lines.setdefault(name, []).append((label, kind, values))
    more = sorted(lines.keys() - _CHARTS.keys() - _NOT_DRAWN)
    charts = _CHARTS | {name: (name.replace("_", " "), "") for name in more}
    # A run has one color on the page, in charts that others lack too.
    labels = list(dict.fromkeys(x[0] for of in lines.values() for x in of))
    return [
        {"title": title, "unit": unit, "more": name in more,
         "traces": _traces(lines[name], labels, len(runs) > 1)}
        for name, (title, unit) in charts.items() if name in lines
    ]  # fmt: skip


def _traces(
    lines: Sequence[tuple], labels: Sequence[str], several: bool
) -> list[dict[str, Any]]:
    """Return the traces of (label, kind, values) in one chart.

    Args:
      lines: of the chart.
      labels: of the page.
      several: whether the page is of several runs.
    """
    several |= len({label for label, *_ in lines}) > 1
    traces, named = [], set()
    for label, kind, values in lines:
        # A legend has an entry a label, which hides all of its kinds.
        name = label if several else kind
        place = labels.index(label) if several else list(_LOOKS).index(kind)
        full = f"{label}, {kind}" if label else kind
        short = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
        look = _LOOKS["test" if len(values["x"]) == 1 else kind]
        color = {"color": _COLORS[place % len(_COLORS)]}
        traces.append(
            {
                **values,
                "name": html.escape(short, quote=False),
                "meta": full,
                "legendgroup": name,
                "showlegend": (several or len(lines) > 1) and name not in named,
                "mode": look["mode"],
                "line": color | {"width": 1.6} | look.get("line", {}),
                "marker": color | look.get("marker", {}),
                "hovertemplate": "%{y:.4~g}"
                + ("%{text}" if "text" in values else "")
                + f"<extra>{html.escape(full, quote=False)}</extra>",
            }
        )
        named.add(name)
    return traces


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return steps and numbers, those of accuracies with their intervals."""
    rows = sorted(rows, key=lambda r: r["step"])
    values = [number(r[key]) for r in rows]
    trace: dict[str, Any] = {"x": [r["step"] for r in rows], "y": values}
    name, slash, teacher = key.partition("/")
    if name != "exact_match":
        return trace
    low, high = (
        [number(r.get(f"{name}_{end}{slash}{teacher}")) for r in rows]
        for end in ("low", "high")
    )
    bars = {
        "array": list(map(_difference, high, values)),
        "arrayminus": list(map(_difference, values, low)),
        "thickness": 1,
        "width": 0,
    }
    return trace | {"text": list(map(range_text, low, high)), "error_y": bars}


def _difference(more: float | None, less: float | None) -> float | None:
    return None if more is None or less is None else more - less


def html_of(chart: Mapping[str, Any]) -> str:
    """Return a chart as HTML that needs plotly's script on the page.

    Args:
      chart: of :func:`curves_of`.
    """
    layout = {
        "height": 230,
        "margin": {"l": 46, "r": 8, "t": 6, "b": 22},
        "hovermode": "x unified",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 11},
        "legend": {"orientation": "h", "y": -0.14, "x": 0},
        "xaxis": {"rangemode": "tozero", "zeroline": False, "nticks": 6,
                  "showgrid": False, "spikethickness": 1,
                  "unifiedhovertitle": {"text": "step %{x}"}},
        "yaxis": {"zeroline": False, "tickformat": ".4~g"},
    }  # fmt: skip
    if chart["unit"].startswith("share"):
        layout["yaxis"] |= {"rangemode": "nonnegative",
                            "autorangeoptions": {"clipmax": 1.02}}  # fmt: skip
    return plotly.io.to_html(
        {"data": chart["traces"], "layout": layout},
        config={"displayModeBar": False, "responsive": True},
        include_plotlyjs=False, full_html=False, validate=False,
        default_height="230px",
    )  # fmt: skip


def summary_of(chart: Mapping[str, Any]) -> str:
    """Tell a chart to those who cannot see it: both ends of every line.

    Args:
      chart: of :func:`curves_of`.
    """
    return f"{chart['title']}: " + "; ".join(
        f"{t['meta']} {number_text(t['y'][0])} at step {t['x'][0]}, "
        f"{number_text(t['y'][-1])} at step {t['x'][-1]}"
        for t in chart["traces"]
    )
