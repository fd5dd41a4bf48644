"""Flags that leave a program more memory, from what its plan counted.

They change what a step needs and takes, not what it computes. Each program
that does not fit gets the first of its list that applies; plan again with it.
"""

import math
from collections.abc import Iterator

from topd_jax.data.templates import teacher_width
from topd_jax.planning.plan import Plan, ProgramPlan
from topd_jax.training.config import Settings
from topd_jax.training.shapes import model_configs, teacher_prompts

# Attention kernels read at least so many tokens at once.
_KERNEL_TOKENS = 128
# Tokens of a chunk of the fused losses, for each device that rows are on.
_CHUNK = 256


def suggest(settings: Settings, plan: Plan) -> list[str]:
    """Name a flag for each program that does not fit.

    Args:
      settings: of the run.
      plan: of these settings, whose memory decides.

    Returns:
      "--config.section.key=value"; [] if there is nothing to change.
    """
    options = (_options(settings, plan, p) for p in plan.failing)
    first = [f"--config.{flag}" for o in options if (flag := next(o, ""))]
    return list(dict.fromkeys(first))


def _options(
    settings: Settings, plan: Plan, program: ProgramPlan
) -> Iterator[str]:
    """List what helps a program, the cheapest first."""
    name, mesh = program.name.removesuffix(" 2"), plan.mesh
    ways = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert"))
    if mesh["data"] > 1 and program.held > program.capacity / 2:
        axes = {**mesh, "data": 1, "fsdp": mesh["data"] * mesh["fsdp"]}
        # Where one is given, the others are no longer chosen.
        given = (a for a, size in axes.items() if size > 1 or a == "data")
        yield " --config.".join(f"mesh.{a}={axes[a]}" for a in given)
    data = settings.data
    tokens = settings.rollout.max_new_tokens + (
        teacher_width(data) if name == "score" else data.max_prompt_length
    )
    alone = name in ("rollout", "evaluate", "train_step")
    kernels = [
        f"{section}.attention=flash"
        for section, config in model_configs(settings).items()
        # No kernel has attention sinks.
        if (section == "student" or not alone)
        and config.attention == "blocks"
        and not config.sinks
    ]
    if tokens >= _KERNEL_TOKENS and kernels:
        yield " --config.".join(kernels)
    if name == "train_step":
        now, samples = settings.optimizer.accumulate, data.samples
        parts = [samples * n for n in teacher_prompts(settings).values()]
        for slices in range(now + 1, data.batch_size * samples // ways + 1):
            # So many that temporaries should fit.
            enough = slices * (program.capacity - program.held)
            even = not any(part % (slices * ways) for part in parts)
            if even and enough >= now * program.temporaries:
                yield f"optimizer.accumulate={slices}"
        if settings.student.remat != "full":
            yield "student.remat=full"
    decoding = "branch_sharding" if name == "score" else "sharding"
    writes = name in ("rollout", "evaluate", "score")
    if writes and getattr(settings.rollout, decoding) == "gathered":
        yield f"rollout.{decoding}=rows"
    chunk = settings.train.chunk_size or math.inf
    fused = ("score", "train_step", "statistics", "compare")
    if name in fused and chunk > _CHUNK * ways:
        yield f"train.chunk_size={_CHUNK * ways}"
    half, slots = settings.eval.batch_size // 2, settings.rollout.slots
    # As many rows are written in slots, however many there are.
    fewer = not slots or half < slots < data.batch_size * data.samples
    if name in ("evaluate", "compare") and half and half % ways == 0 and fewer:
        yield f"eval.batch_size={half}"
