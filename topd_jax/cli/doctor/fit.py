"""Checks of dtypes, meshes and memory, from shapes alone.

Memory of a device, a rule of thumb within about a factor of two of the
compiler (``topd plan`` compiles). With W the bytes of what the student
learns, and P + T columns, more where branches are read, of the rows that a
device has:

* kept: the models, and two moments of Adam (2 W), of their shapes exactly;
* rollout: the student's cache, twice (old and grown);
* score: the teacher's cache, one of its layers, four chunks of logits;
* update: 4 W (gradient, and new student and moments beside the old), every
  layer for the backward pass (with remat "full" its input, and one layer) of
  one slice of optimizer.accumulate, the same chunks.

A layer keeps, a column, 8 width + 3 mlp_width + 3 (heads + kv_heads)
head_dim numbers, and its attention's scores twice: float32, and the weights.
"""

import math
import os
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from topd_jax.cli.doctor.files import Context
from topd_jax.cli.doctor.findings import Finding, judge, refusal
from topd_jax.losses.chunks import chunk_tokens
from topd_jax.models import DecoderConfig
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel import sharding
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.rules import RULES, mesh_axes, reading_rules
from topd_jax.planning.programs import abstract_models, bytes_held
from topd_jax.sampling import branch_columns
from topd_jax.training.config import Settings

_BYTES = {"float32": 4, "bfloat16": 2}
# Spacing of bfloat16 numbers, relative to the number.
_BFLOAT16_STEP = 2.0**-8
# Chunks of logits that live at a time (topd_jax.losses.chunks).
_LOGIT_BLOCKS = 4


def dtypes(context: Context) -> Iterator[Finding]:
    """Check that updates survive rounding."""
    student = context.configs["student"]
    rate = context.settings.optimizer.learning_rate
    # An update of Adam is about the learning rate; weights are initialized
    # with standard deviation width ** -0.5, and half a step rounds to none.
    weight = student.width**-0.5
    least = 0.5 * _BFLOAT16_STEP * weight
    lost = student.param_dtype == "bfloat16" and rate < least
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


def meshes(context: Context) -> Iterator[Finding]:
    """Check that every parameter divides among its devices."""
    if context.mesh is None:
        return
    try:
        abstract_models(context.settings, context.mesh)
    except ValueError as raised:
        yield refusal("mesh", raised)
        return
    sizes = context.mesh.shape.items()
    axes = " x ".join(f"{n}={s}" for n, s in sizes if s > 1) or "1 device"
    yield Finding("ok", "mesh", axes)


def memory(context: Context) -> Iterator[Finding]:
    """Compare the estimate with what a device has."""
    if context.mesh is None:
        return
    try:
        need = estimate(context.settings, context.mesh)
    except ValueError:
        return  # the check of the mesh has said it
    have = device_bytes(context.mesh)
    kept = need.pop("kept")
    largest = max(need, key=need.get)
    peak = kept + need[largest]
    text = (
        f"about {_spelled(peak)} a device at the peak: models and optimizer "
        f"{_spelled(kept)}, {largest} {_spelled(need[largest])}; the device "
        f"{f'has {_spelled(have)}' if have else 'does not say what it has'}"
    )
    yield judge(
        "memory",
        have is None or peak < 0.9 * have,
        text,
        "smaller data.batch_size or rollout.max_new_tokens, more "
        "optimizer.accumulate, student.remat='full', "
        "teacher.param_dtype='bfloat16', or a larger mesh.fsdp; topd plan "
        "counts exactly",
    )


def estimate(settings: Settings, mesh: Mesh) -> dict[str, float]:
    """Estimate the memory of a run on one device, from shapes.

    The module's docstring has the formulas.

    Args:
      settings: of the run.
      mesh: of devices.

    Returns:
      Bytes that are "kept", and that "rollout", "score" and "update" add.

    Raises:
      ValueError: for a parameter that does not divide over the mesh.
    """
    data, objective = settings.data, make_objective(settings.objective)
    models = abstract_models(settings, mesh)
    student = models.student.config
    largest = max((t.model for t in models.teachers), key=bytes_held)
    teacher, state = largest.config, bytes_held(models.state)
    # Rows are spread as far as they divide, where they are written and read.
    batch = data.batch_size * data.samples
    parts = sharding.dividing(mesh, (batch,), (reading_rules()["batch"],))
    rows = batch // math.prod(mesh.shape[a] for a in mesh_axes(parts[0]))
    new = settings.rollout.max_new_tokens
    length, branches = data.max_prompt_length + new, 0
    if ahead := objective.needs_branches and objective.near_future:
        branches = branch_columns(objective.branches, ahead.window)
    layout = loss_layout(mesh, chunk_size=settings.train.chunk_size)
    tokens = min(chunk_tokens(student.vocab_size, layout), batch * new)
    vocab = student.vocab_size / _ways(mesh, "vocab")
    logits = _LOGIT_BLOCKS * 4 * vocab * tokens / _ways(mesh, "tokens")
    learned = length + branches * objective.trains_on_branch
    slices = _ways(mesh, "batch") * settings.optimizer.accumulate
    part, columns = math.ceil(batch / slices), learned / _ways(mesh, "sequence")
    backward = student.layers * _layer(student, part, columns, learned, mesh)
    if student.remat == "full":
        inputs = student.layers * part * columns * student.width
        backward = backward / student.layers + inputs * _BYTES[student.dtype]
    cache = bool(branches) * _cache(teacher, rows, length + branches, mesh)
    return {
        "kept": bytes_held((models.state, models.teachers, models.frozen)),
        "rollout": 2 * _cache(student, rows, length, mesh),
        "score": _layer(teacher, rows, length, length, mesh) + cache + logits,
        "update": 4 / 3 * state + backward + logits,
    }


def device_bytes(mesh: Mesh) -> float | None:
    """Return the bytes of one device, None where it does not tell them.

    A CPU has its share of the machine's.
    """
    index = jax.process_index()
    device = next(d for d in mesh.devices.flat if d.process_index == index)
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _spelled(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _ways(mesh: Mesh, axis: str) -> int:
    return math.prod(mesh.shape[name] for name in mesh_axes(RULES[axis]))


def _cache(config: DecoderConfig, rows: int, columns: int, mesh: Mesh) -> float:
    heads = config.kv_heads / _ways(mesh, "activation_kv_heads")
    size = config.layers * rows * columns * heads * config.head_dim
    return 2 * size * _BYTES[config.dtype]


def _layer(
    config: DecoderConfig, rows: int, columns: float, keys: int, mesh: Mesh
) -> float:
    """Return what one layer holds of columns that attend to all keys."""
    size, tensor = _BYTES[config.dtype], _ways(mesh, "activation_heads")
    active = config.experts_per_token * config.expert_width
    inner = active if config.experts else config.mlp_width
    heads = 3 * (config.heads + config.kv_heads) * config.head_dim
    column = 8 * config.width + (3 * inner + heads) / tensor
    scores = config.heads / tensor * keys * (4 + size)
    return rows * columns * (column * size + scores)
