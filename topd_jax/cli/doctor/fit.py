"""Checks of dtypes and memory, from shapes alone (ours)."""

import dataclasses
import math
import os
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from topd_jax.cli.doctor.findings import Finding, ok, warning
from topd_jax.losses.chunks import chunk_tokens
from topd_jax.models import DecoderConfig, Lora, parameter_table
from topd_jax.models.quantization import bytes_a_number
from topd_jax.parallel import sharding
from topd_jax.sampling import branch_columns
from topd_jax.training.config import ModelSettings, Settings
from topd_jax.training.setup import model_settings

_BYTES = {"float32": 4, "bfloat16": 2}
# Spacing of bfloat16 numbers, relative to the number.
_BFLOAT16_STEP = 2.0**-8
# Chunks of logits that live at a time (topd_jax.losses.chunks).
_LOGIT_BLOCKS = 4
_LARGE = 10**9
_GB = 1e9


def dtypes(
    settings: Settings, configs: Mapping[str, DecoderConfig]
) -> list[Finding]:
    """Whether updates survive rounding, and what the teacher's dtype costs."""
    student, name = configs["student"], "dtype"
    rate = settings.optimizer.learning_rate
    # An update of Adam is about the learning rate; weights are initialised
    # with standard deviation width ** -0.5, and half a step rounds to none.
    least = 0.5 * _BFLOAT16_STEP * student.width**-0.5
    found = []
    if student.param_dtype == "bfloat16" and rate < least:
        found.append(
            warning(
                name,
                f"the student's weights are kept in bfloat16, in which updates "
                f"of optimizer.learning_rate={rate:g} are lost in rounding "
                f"(weights of {student.width**-0.5:.1g} move by {least:.0e} or "
                "not at all)",
                "--config.student.param_dtype=float32",
            )
        )
    text = "; ".join(
        f"{who} {c.param_dtype}, computed in {c.dtype}"
        for who, c in configs.items()
    )
    for who, teacher in configs.items():
        size = _parameter_count(teacher)
        wide = teacher.param_dtype == "float32" and who != "student"
        if wide and size > _LARGE:
            text += (
                f"; the {who}'s {4 * size / _GB:.0f} GB would be half in "
                f"bfloat16 ({who}.param_dtype)"
            )
    return found or [ok(name, text)]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device, estimated.

    Attributes:
      kept: models and optimizer, all the time.
      rollout: what the rollout adds.
      annotate: what the annotation adds.
      update: what the update adds.
    """

    kept: float
    rollout: float
    annotate: float
    update: float

    @property
    def peak(self) -> float:
        """The largest of the three phases, on top of what is kept."""
        return self.kept + max(self.rollout, self.annotate, self.update)


def estimate(
    settings: Settings,
    configs: Mapping[str, DecoderConfig],
    mesh: Mesh,
    part: int | None = None,
) -> Memory:
    """Memory of a run on one device, from shapes.

    With W_s, W_t bytes of the parameters a device, R rows a device (rows are
    spread over mesh.sequence too, but in the update, where columns are), P + T
    columns, E = M (K - 1) columns of branches where the objective looks
    ahead, a bytes a number of the compute dtype, N layers:

    * kept: 4 W_s (the student, its start, two moments of Adam) + W_t; with
      adapters W_s + 4 W_a, and W_a stands for W_s in the update;
    * rollout: the student's copy in its compute dtype + its cache
      2 a N R (P + T) kv_heads head_dim, twice (old and grown);
    * annotate: the teacher's cache over P + T + E columns and one layer;
    * update: 4 W_s (gradient, and new student and moments beside the old) +
      what a layer keeps for the backward pass, N times (with remat "full" its
      input, N times, and one layer), of one slice of optimizer.accumulate +
      the head's gradient in float32.

    A layer keeps, a column, 8 width + 3 mlp_width + 3 (heads + kv_heads)
    head_dim numbers, and its attention heads (P + T)^2 scores twice: float32,
    and the weights. Four chunks of logits are added to both passes. It is a
    rule of thumb: compilers fuse and copy as they like.

    Args:
      settings: of the run.
      configs: "student" and every teacher, as their files say.
      mesh: of devices.
      part: rows that go through at a time; None for all of a batch.

    Returns:
      The bytes.
    """
    data, objective = settings.data, settings.objective
    models, student = model_settings(settings), configs["student"]
    teachers = [c for who, c in configs.items() if who != "student"]
    teacher = max(teachers, key=_parameter_count)
    whole = part or data.batch_size * data.samples
    # Spread as far as they divide, where whole rows are written and read.
    parts = sharding.dividing(mesh, (whole,), (sharding.READING["batch"],))
    spread = math.prod(
        mesh.shape[axis] for axis in sharding.mesh_axes(parts[0])
    )
    rows = whole // spread
    length = data.max_prompt_length + settings.rollout.max_new_tokens
    ahead = objective.pieces.looks_ahead
    extra = branch_columns(objective.candidates, objective.window)
    held = {
        who: _parameter_bytes(config, mesh, models[who].quantize)
        for who, config in configs.items()
    }
    ours, theirs = held["student"], sum(held.values()) - held["student"]
    trained = _adapter_bytes(student, settings.student, mesh)
    kept = 4 * ours if trained is None else ours + 4 * trained
    trained = ours if trained is None else trained
    wrote = teacher if objective.offline else student
    copied = 0.0
    if wrote.dtype != wrote.param_dtype:
        copied = _parameter_bytes(wrote, mesh) * _BYTES[wrote.dtype]
        copied /= _BYTES[wrote.param_dtype]
    read = length + extra * ahead
    tokens = whole * settings.rollout.max_new_tokens
    logits = _logits(student, math.ceil(tokens / _ways(mesh, "tokens")), mesh)
    annotated = _layer(teacher, rows, length, length, mesh) + logits
    annotated += ahead * _cache(teacher, rows, read, mesh)
    learned = length + extra * objective.trains_on_branch
    slice_rows = math.ceil(
        whole / _ways(mesh, "batch") / settings.optimizer.accumulate
    )
    columns = learned / _ways(mesh, "sequence")
    return Memory(
        kept + theirs,
        copied + 2 * _cache(wrote, rows, length, mesh),
        annotated + rows * length * teacher.width * _BYTES[teacher.dtype],
        4 * trained
        + _backward(student, slice_rows, columns, learned, mesh)
        + 4 * student.vocab_size * student.width / _ways(mesh, "vocab")
        + logits,
    )


def estimate_apart(
    settings: Settings,
    configs: Mapping[str, DecoderConfig],
    mesh: Mesh,
    theirs: Mesh,
) -> tuple[Memory, Memory]:
    """Memory of a device of the student's, and of one of the teacher's.

    As :func:`estimate`, each with its own models. The teachers' heads and
    states are on the student's devices too, the student's embedding on the
    teacher's; of ``teacher_mesh.parts`` slices one is written and one is read
    at a time, and the teacher's states of all of them wait beside it.

    Args:
      settings: of the run.
      configs: "student" and every teacher.
      mesh: the student's.
      theirs: the teacher's.

    Returns:
      (student's, teacher's).
    """
    data, parts = settings.data, settings.teacher_mesh.parts
    models, student = model_settings(settings), configs["student"]
    teachers = {who: c for who, c in configs.items() if who != "student"}
    columns = data.batch_size * data.samples * settings.rollout.max_new_tokens
    # Each row has those of one teacher.
    states = columns * max(t.width * _BYTES[t.dtype] for t in teachers.values())

    def rows(config: DecoderConfig, mesh: Mesh) -> float:
        ways = _ways(mesh, "vocab") * _ways(mesh, "embed")
        size = config.vocab_size * config.width * _BYTES[config.param_dtype]
        return size / ways

    def held(mesh: Mesh) -> float:
        return sum(
            _parameter_bytes(teacher, mesh, models[who].quantize)
            for who, teacher in teachers.items()
        )

    part = data.batch_size // parts * data.samples
    ours = estimate(settings, configs, mesh)
    states_here = states / _ways(mesh, "batch")
    ours = dataclasses.replace(
        ours,
        kept=ours.kept
        - held(mesh)
        + sum(rows(teacher, mesh) for teacher in teachers.values()),
        rollout=estimate(settings, configs, mesh, part).rollout,
        annotate=states_here * (2 if parts > 1 else 1),
        update=ours.update + states_here,
    )
    other = estimate(settings, configs, theirs, part)
    waiting = states / _ways(theirs, "batch")
    return ours, Memory(
        held(theirs) + rows(student, theirs),
        0.0,
        other.annotate + waiting,
        0.0,
    )


def memory(
    settings: Settings,
    configs: Mapping[str, DecoderConfig],
    mesh: Mesh,
    theirs: Mesh | None = None,
) -> list[Finding]:
    """The estimate against what a device has, of each mesh."""
    if theirs is None:
        return _memory(estimate(settings, configs, mesh), mesh, "memory")
    ours, other = estimate_apart(settings, configs, mesh, theirs)
    return [
        *_memory(ours, mesh, "memory (student's mesh)"),
        *_memory(other, theirs, "memory (teacher's mesh)"),
    ]


def _memory(need: Memory, mesh: Mesh, name: str) -> list[Finding]:
    have = device_bytes(mesh)
    phases = {
        phase: getattr(need, phase)
        for phase in ("rollout", "annotate", "update")
    }
    largest = max(phases, key=phases.get)
    text = (
        f"about {_spelt(need.peak)} a device at the peak: models and optimizer "
        f"{_spelt(need.kept)}, {largest} {_spelt(phases[largest])}"
    )
    if have is None:
        return [ok(name, f"{text}; the device does not say what it has")]
    text += f"; it has {_spelt(have)}"
    if need.peak < 0.9 * have:
        return [ok(name, text)]
    return [
        warning(
            name,
            text,
            "smaller data.batch_size or rollout.max_new_tokens, more "
            "optimizer.accumulate, student.remat='full', teacher.param_dtype="
            "'bfloat16', or a larger mesh.fsdp",
        )
    ]


def device_bytes(mesh: Mesh) -> float | None:
    """Memory of one device; a CPU's share of the machine's.

    Args:
      mesh: of devices.

    Returns:
      Bytes; None where the device does not tell.
    """
    own = [
        d for d in mesh.devices.flat if d.process_index == jax.process_index()
    ]
    # Where another process has them all, they are taken to be as ours.
    device = own[0] if own else jax.local_devices()[0]
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _spelt(size: float) -> str:
    return f"{size / _GB:.1f} GB" if size >= _GB else f"{size / 1e6:.0f} MB"


def _ways(mesh: Mesh, axis: str) -> int:
    rule = sharding.RULES[axis]
    names = (rule,) if isinstance(rule, str) else (rule or ())
    return math.prod(mesh.shape[name] for name in names)


def _parameter_count(config: DecoderConfig) -> int:
    return sum(math.prod(r.shape) for r in parameter_table(config).values())


def _parameter_bytes(
    config: DecoderConfig, mesh: Mesh, kind: str = "", only: str = ""
) -> float:
    total = 0.0
    for name, row in parameter_table(config).items():
        if only not in name:
            continue
        ways = math.prod(_ways(mesh, a) for a in row.axes if a is not None)
        size = bytes_a_number(name, kind) or _BYTES[config.param_dtype]
        total += math.prod(row.shape) / ways * size
    return total


def _adapter_bytes(
    config: DecoderConfig, settings: ModelSettings, mesh: Mesh
) -> float | None:
    """Of a student's adapters, float32; None where it trains everything.

    Of adapters that are read from a directory, whose rank is not known here,
    next to nothing.
    """
    if not settings.lora_rank and not settings.adapter:
        return None
    lora = Lora(
        settings.lora_rank or 1,
        settings.lora_alpha,
        settings.lora_targets or config.lora_targets,
    )
    wide = dataclasses.replace(config, lora=lora, param_dtype="float32")
    return _parameter_bytes(wide, mesh, only="_lora_")


def _cache(config: DecoderConfig, rows: int, columns: int, mesh: Mesh) -> float:
    heads = config.kv_heads / _ways(mesh, "activation_kv_heads")
    size = config.layers * rows * columns * heads * config.head_dim
    return 2 * size * _BYTES[config.dtype]


def _logits(config: DecoderConfig, count: int, mesh: Mesh) -> float:
    # With no mesh in use, chunk_tokens speaks of one device.
    chunk = min(chunk_tokens(config.vocab_size), count)
    size = 4 * chunk * config.vocab_size / _ways(mesh, "vocab")
    return _LOGIT_BLOCKS * size


def _layer(
    config: DecoderConfig, rows: int, columns: float, seen: int, mesh: Mesh
) -> float:
    """What one layer holds at once, or keeps for the backward pass.

    Of so many columns a device, each of which attends to all that are seen.
    """
    size, tensor = _BYTES[config.dtype], _ways(mesh, "activation_heads")
    active = config.experts_per_token * config.expert_width
    inner = max(config.mlp_width if config.dense_layers else 0, active)
    heads = 3 * (config.heads + config.kv_heads) * config.head_dim
    column = 8 * config.width + (3 * inner + heads) / tensor
    scores = config.heads / tensor * seen * (4 + size)
    return rows * columns * (column * size + scores)


def _backward(
    config: DecoderConfig, rows: int, columns: float, seen: int, mesh: Mesh
) -> float:
    one = _layer(config, rows, columns, seen, mesh)
    inputs = rows * columns * config.width * _BYTES[config.dtype]
    if config.remat == "full":
        return config.layers * inputs + one
    return config.layers * one
