"""Checks of dtypes, meshes and memory, from shapes alone.

Memory is what a run keeps on a device: the models, and two moments of Adam
for what the student learns, of their shapes exactly. Caches, activations and
logits come on top; ``topd plan`` compiles the programs and counts those too.
"""

import os
from collections.abc import Iterator

import jax

from topd_jax.cli.doctor.files import Context
from topd_jax.cli.doctor.findings import Finding, judge, refusal
from topd_jax.parallel.sharding import row_ways
from topd_jax.training.placement import device_bytes
from topd_jax.training.shapes import abstract_models, bytes_held

# Spacing of bfloat16 numbers, relative to the number.
_BFLOAT16_STEP = 2.0**-8
# Share of a device from which on what is kept leaves too little for the rest.
_MOST = 0.8


def dtypes(context: Context) -> Iterator[Finding]:
    """Check that updates survive rounding."""
    student = context.configs["student"]
    rate = context.settings.optimizer.learning_rate
    # An update of Adam is about the learning rate; weights are initialized
    # with standard deviation width ** -0.5, and half a step rounds to none.
    weight = student.width**-0.5
    least = 0.5 * _BFLOAT16_STEP * weight
    # Adapters are float32 whatever is beside them.
    learns = student.param_dtype if student.lora is None else "float32"
    lost = learns == "bfloat16" and rate < least
    text = "; ".join(
        f"{who} {c.param_dtype}, computed in {c.dtype}"
        for who, c in context.configs.items()
    )
    if lost:
        text = (
            "the student's weights are kept in bfloat16, in which updates of "
            f"optimizer.learning_rate={rate:g} are lost in rounding (weights "
            f"of {weight:.1g} move by {least:.0e} or not at all)"
        )
    yield judge("dtype", not lost, text, "--config.student.param_dtype=float32")


def repeatable(context: Context) -> Iterator[Finding]:
    """Check that a GPU is told to compute the same bits each time."""
    if jax.default_backend() != "gpu":
        return
    flag = "--xla_gpu_deterministic_ops=true"
    told = flag in os.environ.get("XLA_FLAGS", "").split()
    text = "the same bits from run to run" if told else (
        "a resumed run may differ in its last bits from one never stopped"
    )  # fmt: skip
    yield judge("repeatable", told, text, f"export XLA_FLAGS={flag}")


def meshes(context: Context) -> Iterator[Finding]:
    """Check that every parameter divides among its devices, and fits them."""
    if context.mesh is None:
        return
    try:
        models = abstract_models(context.settings, context.mesh)
    except ValueError as raised:
        yield refusal("mesh", raised)
        return
    sizes = context.mesh.shape.items()
    axes = " x ".join(f"{n}={s}" for n, s in sizes if s > 1) or "1 device"
    yield Finding("ok", "mesh", axes)
    kept = bytes_held((models.state, models.teachers, models.frozen))
    have = device_bytes(context.mesh)
    yield judge(
        "memory",
        have is None or kept < _MOST * have,
        f"models and optimizer keep {_spelled(kept)} of a device, caches and "
        "activations come on top; the device "
        f"{f'has {_spelled(have)}' if have else 'does not say what it has'}",
        "teacher.param_dtype='bfloat16', student.lora_rank, or a larger "
        "mesh.fsdp; topd plan counts the rest",
    )


def slices(context: Context) -> Iterator[Finding]:
    """Check that every slice of an update is spread over the devices."""
    settings, mesh = context.settings, context.mesh
    count = settings.optimizer.accumulate
    # Rows of written solutions are made so that they divide.
    if mesh is None or count == 1 or settings.offline.path:
        return
    ways = row_ways(mesh)
    rows = settings.data.batch_size * settings.data.samples
    yield judge(
        "slices",
        rows // count % ways == 0,
        f"optimizer.accumulate={count}: slices of {rows // count} rows, spread "
        f"over {ways} devices; rows that do not divide among them cost time "
        "and save no memory",
        f"an optimizer.accumulate that divides {rows // ways}, or another "
        "data.batch_size",
    )


def _spelled(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
