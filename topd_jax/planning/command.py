"""``topd plan``: the plan as a table and as JSON, and what to change."""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import jax

from topd_jax.planning.advice import suggest
from topd_jax.planning.chips import without_tpu
from topd_jax.planning.plan import USABLE, Plan, make_plan, roofline
from topd_jax.training.config import Settings

_GIB = 2.0**30
_LESS = "more chips, shorter rollouts or fewer rows"


def plan(
    settings: Settings, topology: str, *, output: str | None = None
) -> str:
    """Plan a run; name flags that should make it fit if it does not.

    Args:
      settings: of the run.
      topology: TPU kind and shape, "v5e:2x4".
      output: file that the plan is written to as JSON; a line is added to one
        that ends in ".jsonl".

    Returns:
      The table, and what to change.

    Raises:
      ValueError: for a topology or model that is not known, or what does not
        divide over the mesh.
    """
    without_tpu()
    log = functools.partial(print, file=sys.stderr, flush=True)
    first = make_plan(settings, topology, log=log)
    if output is not None:
        path = pathlib.Path(output)
        record = {"plan": dataclasses.asdict(first), "jax": jax.__version__}
        line = json.dumps(record | {"settings": settings.to_dict()}) + "\n"
        with path.open("a" if path.suffix == ".jsonl" else "w") as file:
            file.write(line)
    if not first.failing:
        return table(first)
    flags = " ".join(suggest(settings, first)) or _LESS
    return f"{table(first)}\n\nchange: {flags}"


def table(plan: Plan) -> str:
    """Return the plan as aligned lines, every figure that of one device.

    Args:
      plan: of :func:`topd_jax.planning.plan.make_plan`.
    """
    devices = math.prod(plan.mesh.values())
    shape = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.topology}: {devices} devices ({plan.chip.kind}), mesh {shape}",
        f"Memory in GiB, {USABLE:.0%} of {plan.chip.memory / _GIB:.0f} may be "
        "used; seconds are the roofline of one device,",
        "a lower bound for rollouts of rollout.max_new_tokens.",
        "",
        *_aligned(_rows(plan)),
    ]
    if seconds := plan.step_seconds:
        lines += [
            "",
            f"rollout, score and train_step: {seconds:.2f} s; {plan.generated} "
            f"tokens generated, {plan.generated / seconds:.0f} a second",
        ]
    return "\n".join(lines)


def _rows(plan: Plan) -> list[list[str]]:
    rows = [
        ["program", "held", "temporary", "total", ""]
        + ["TFLOP", "HBM GB", "sent GB", "seconds", "bound by"]
    ]
    for p in plan.programs:
        memory = (p.held, p.temporaries, p.total)
        row = [p.name, *(f"{x / _GIB:.2f}" for x in memory)]
        row.append("fits" if p.fits else f"{p.excess / _GIB:.2f} too much")
        if p.cost is None:
            row += [""] * 5
        else:
            seconds, bound = roofline(p.cost, plan.chip)
            row += [f"{p.cost.flops / 1e12:.2f}", f"{p.cost.bytes / 1e9:.1f}"]
            row += [f"{p.cost.sent / 1e9:.2f}", f"{seconds:.2f}", bound]
        rows.append(row)
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
