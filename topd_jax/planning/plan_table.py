"""A plan as a table for people. Ours."""

import math
from collections.abc import Sequence

from topd_jax.planning.compiling import USABLE, ProgramPlan
from topd_jax.planning.hlo_bytes import COLLECTIVES
from topd_jax.planning.plan import Plan

_GIB = 2.0**30


def table(plan: Plan) -> str:
    """The plan as text, every figure that of one device.

    Args:
      plan: of :func:`topd_jax.planning.plan.make_plan`.

    Returns:
      Lines, aligned.
    """
    meshes = [m for m in (plan.mesh, plan.teacher_mesh) if m is not None]
    devices = sum(math.prod(mesh.values()) for mesh in meshes)
    shape, *own = (
        " ".join(f"{axis}={size}" for axis, size in mesh.items())
        for mesh in meshes
    )
    lines = [
        f"{plan.topology}: {devices} devices ({plan.chip.kind}), mesh {shape}",
        *(f"the teacher's mesh {shape}, {plan.parts} parts" for shape in own),
        "",
        f"Memory of a device, GiB; {USABLE:.0%} of "
        f"{plan.chip.memory / _GIB:.0f} may be used",
        *_aligned(_memory(plan)),
    ]
    for program in plan.programs:
        if not program.fits and program.largest:
            lines += ["", f"the largest buffers of {program.name}:"]
            lines += [f"  {buffer}" for buffer in program.largest]
        if program.heaviest:
            lines += ["", f"what moves and sends the most in {program.name}:"]
            lines += [f"  {line}" for line in _aligned(_heaviest(program))]
    if plan.phases:
        lines += [
            "",
            "A step at the least (roofline of one device's work at its peaks;",
            "every rollout runs to rollout.max_new_tokens)",
            *_aligned(_times(plan)),
            "",
            f"{plan.generated} tokens generated a step, "
            f"{plan.tokens_per_second:.0f} a second",
        ]
    if plan.teacher_mesh is not None:
        lines.append(
            f"{plan.moved / 1e9:.2f} GB of annotations move between the meshes "
            "a step, not in its time"
        )
    if plan.overhead is not None:
        lines.append(
            f"looking ahead adds {plan.overhead:.0%} to a step of plain OPD"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> list[list[str]]:
    rows = [
        [
            "program", "arguments", "elsewhere", "temporary", "results",
            "total", "", "compiled in",
        ]
    ]  # fmt: skip
    for p in plan.programs:
        parts = (p.arguments, p.elsewhere, p.temporaries, p.results + p.code)
        verdict = "fits" if p.fits else f"{p.excess / _GIB:.2f} too much"
        rows.append(
            [
                p.name,
                *(f"{x / _GIB:.2f}" for x in (*parts, p.total)),
                verdict,
                f"{p.seconds:.0f} s",
            ]
        )
    return rows


def _heaviest(program: ProgramPlan) -> list[list[str]]:
    rows = [["operation", "times", "HBM GB", "sent GB", "result", "source"]]
    for h in program.heaviest:
        gigabytes = (f"{x / 1e9:.2f}" for x in (h.bytes, h.sent))
        # The end of a path tells one from another.
        source = h.source if len(h.source) < 80 else "..." + h.source[-77:]
        rows.append([h.kind, str(h.times), *gigabytes, h.shape, source])
    return rows


def _times(plan: Plan) -> list[list[str]]:
    kinds = [
        k
        for k in COLLECTIVES
        if any(p.cost.collectives.get(k) for p in plan.phases)
    ]
    rows = [
        [
            "phase", "TFLOP", "HBM GB", *(f"{k} GB" for k in kinds),
            "seconds", "bound by", "tokens/s", "MFU",
        ]
    ]  # fmt: skip
    for p in plan.phases:
        rate = p.tokens / p.seconds if p.seconds else 0.0
        rows.append(
            [
                p.name,
                f"{p.cost.flops / 1e12:.2f}",
                f"{p.cost.bytes / 1e9:.1f}",
                *(f"{p.cost.collectives.get(k, 0) / 1e9:.2f}" for k in kinds),
                f"{p.seconds:.2f}",
                p.bound,
                f"{rate:.0f}",
                f"{p.mfu:.1%}",
            ]
        )
    total = ["step", *[""] * (2 + len(kinds)), f"{plan.step_seconds:.2f}"]
    return [*rows, [*total, "", f"{plan.tokens_per_second:.0f}", ""]]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    out = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        out.append("  ".join(cells).rstrip())
    return out
