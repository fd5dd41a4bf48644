"""``topd plan``: the plan as a table and as JSON, and what to change."""

import dataclasses
import json
import math
import pathlib

import jax

from topd_jax.planning.advice import suggest
from topd_jax.planning.chips import DECODED, Chip, without_tpu
from topd_jax.planning.plan import (
    USABLE,
    Plan,
    ProgramPlan,
    expected,
    make_plan,
    roofline,
)
from topd_jax.training.config import Settings

_GIB = 2.0**30
_HEAD = (
    "program            held  temporary      total"
    "                       TFLOP    HBM GB   sent GB  seconds bound by"
    "    about   calls  chip-hours"
)
_LESS = "more chips, shorter rollouts or fewer rows"


def plan(
    settings: Settings, topology: str, *, output: pathlib.Path | None = None
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
    if output is not None:  # before minutes of work are lost
        output.parent.mkdir(parents=True, exist_ok=True)
    without_tpu()
    first = make_plan(settings, topology)
    if output is not None:
        record = {"plan": dataclasses.asdict(first), "jax": jax.__version__}
        line = json.dumps(record | {"settings": settings.to_dict()}) + "\n"
        adds = output.suffix == ".jsonl" and output.exists()
        # Objects of a bucket do not grow.
        output.write_text((output.read_text() if adds else "") + line)
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
        f"Memory in GiB: {USABLE:.0%} of {plan.chip.memory / _GIB:.0f} may be "
        "used.",
        "Seconds: the roofline of one device, a lower bound; about: at what is "
        "published of",
        f"such programs, {plan.chip.trained:.0%} of the peak (compute) or "
        f"{DECODED:.0%} of the bandwidth.",
        "Chip-hours: of all calls, so; rollouts are of rollout.max_new_tokens.",
        "",
        _HEAD,
        *(_row(p, plan.chip, devices) for p in plan.programs),
    ]
    if any(p.name == "score 2" for p in plan.programs):
        lines.append("2: of the steps after guidance")
    least, about = plan.step_seconds
    if least:
        lines += [
            "",
            f"rollout, score and train_step: {least:.2f} s, about {about:.2f}; "
            f"{plan.generated} tokens generated, "
            f"{plan.generated / least:.0f} a second, about "
            f"{plan.generated / about:.0f}",
        ]
    return "\n".join(lines)


def _row(p: ProgramPlan, chip: Chip, devices: int) -> str:
    memory = "".join(
        f"{x / _GIB:11.2f}" for x in (p.held, p.temporaries, p.total)
    )
    verdict = "fits" if p.fits else f"{p.excess / _GIB:.2f} too much"
    line = f"{p.name:12}{memory}{verdict:>17}"
    if p.cost is None:
        return line
    seconds, bound = roofline(p.cost, chip)
    flops, moved, sent = p.cost.flops / 1e12, p.cost.bytes / 1e9, p.cost.sent
    about = expected(p.cost, chip)
    hours = about * p.calls * devices * chip.part / 3600
    return (
        f"{line}{flops:11.2f}{moved:10.1f}{sent / 1e9:10.2f}{seconds:9.2f} "
        f"{bound:8}{about:9.2f}{p.calls:8}{hours:12.1f}"
    )
