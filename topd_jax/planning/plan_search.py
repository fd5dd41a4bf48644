"""The cheapest settings that fit on a topology, by compiling few of them.

Slices of a batch (``optimizer.accumulate``), recomputation
(``student.remat``), the mesh, and the chunk of the fused losses change what a
step needs and what it costs, not what it computes. Candidates are ordered by
an estimate of the step's time, those whose parameters alone do not fit are
left out, and programs are compiled, the largest first, until all of a
candidate's fit. A teacher's own mesh stays as it is given. Ours.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from topd_jax.data.records import check_rows
from topd_jax.models.config import DecoderConfig
from topd_jax.models.parameters import parameter_table
from topd_jax.parallel.teacher_mesh import make_meshes
from topd_jax.planning.chips import Chip, chip_of, fits_one_host
from topd_jax.planning.compiling import USABLE
from topd_jax.planning.plan import Plan, make_plan
from topd_jax.planning.programs import (
    abstract_models,
    bytes_held,
    decoder_configs,
    topology_devices,
)
from topd_jax.planning.useful import phase_work
from topd_jax.training.config import Settings

# Share of the update's own operations that recomputing layers adds.
_AGAIN = {"none": 0.0, "dots": 0.15, "full": 1 / 3}

# What fails first comes first.
_ORDER = (
    "update", "annotate", "rollout", "student", "join", "read", "statistics",
    "evaluate", "restore",
)  # fmt: skip

# What runs on the teacher's own mesh, where it has one.
_THEIRS = ("annotate", "read")


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
      flags: how they differ from those given, for the command line.
      verdict: "fits", or which program does not and by how much.
      estimate: seconds of a step, estimated.
    """

    flags: str
    verdict: str
    estimate: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def search(
    settings: Settings,
    topology: str,
    made: Plan,
    *,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Trial], Plan | None]:
    """Looks for the cheapest settings that fit.

    Args:
      settings: of the run that does not.
      topology: to fit on.
      made: its plan.
      seconds: after which no further candidate is begun.
      say: told of what is tried.

    Returns:
      (what was tried in order, the plan of the last one where it fits).
    """
    started = time.perf_counter()
    wrong = [p for p in made.programs if not p.fits]
    trials = [Trial("", _verdict(made), math.inf)]
    order = [p.name for p in wrong] + list(_ORDER)
    order = list(dict.fromkeys(order))
    known: list[tuple[Settings, str]] = [(settings, p.name) for p in wrong]
    for estimate, changed in candidates(settings, topology):
        if time.perf_counter() - started > seconds:
            trials.append(Trial("", "out of time", estimate))
            break
        if any(_no_smaller(changed, old, name) for old, name in known):
            continue
        flags = difference(settings, changed)
        say(f"trying {flags}, about {estimate:.0f} s a step")
        for name in order:
            plan = make_plan(changed, topology, only=(name,), say=say)
            if not plan.fits:
                trials.append(Trial(flags, _verdict(plan), estimate))
                known.append((changed, name))
                break
        else:
            trials.append(Trial(flags, "fits", estimate))
            return trials, make_plan(changed, topology, say=say)
    return trials, None


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "fits"
    worst = max(
        (p for p in plan.programs if not p.fits), key=lambda p: p.excess
    )
    return f"{worst.name} needs {worst.excess / 2**30:.2f} GiB more"


def _no_smaller(new: Settings, old: Settings, name: str) -> bool:
    """Whether ``new`` cannot need less than ``old``, where ``name`` failed."""
    theirs = name in _THEIRS and new.teacher_mesh.devices
    if not theirs and new.mesh != old.mesh:
        return False
    if name != "update":  # neither slices nor recomputation touch it
        return _chunk(new) >= _chunk(old)
    return (
        new.optimizer.accumulate <= old.optimizer.accumulate
        and _AGAIN[new.student.remat] <= _AGAIN[old.student.remat]
        and _chunk(new) >= _chunk(old)
    )


def _chunk(settings: Settings) -> float:
    return settings.objective.chunk_size or math.inf


def difference(old: Settings, new: Settings) -> str:
    """The flags that turn one run's settings into the other's."""
    out = []
    for section in ("mesh", "student", "optimizer", "objective"):
        before, after = getattr(old, section), getattr(new, section)
        for field in dataclasses.fields(after):
            value = getattr(after, field.name)
            if value != getattr(before, field.name):
                out.append(f"--config.{section}.{field.name}={value}")
    return " ".join(out)


def candidates(
    settings: Settings, topology: str
) -> Iterator[tuple[float, Settings]]:
    """Settings worth trying, with an estimate of a step's seconds.

    Args:
      settings: to start from.
      topology: to fit on.

    Yields:
      (estimated seconds, settings), the cheapest first.
    """
    devices = topology_devices(topology)
    chip = chip_of(devices)
    found = []
    count = len(devices) - settings.teacher_mesh.devices
    for mesh in meshes(settings, count):
        changed = dataclasses.replace(settings, mesh=mesh)
        try:
            grid, theirs = make_meshes(
                mesh,
                settings.teacher_mesh,
                devices=devices,
                one_process=fits_one_host(devices),
            )
            for section in ("data", "eval"):
                check_rows(settings, grid, section, theirs)
            models = abstract_models(changed, grid, theirs)
        except ValueError:
            continue  # rows or a parameter do not divide
        held = bytes_held((models.state, models.teacher), grid)
        # The gradients are as large as a third of the state.
        if held + bytes_held(models.student, grid) > USABLE * chip.memory:
            continue
        ways = mesh.data * mesh.fsdp * mesh.expert
        rows = settings.data.batch_size * settings.data.samples
        slices = [n for n in _divisors(rows) if (rows // n) % ways == 0]
        for accumulate, remat, chunk in itertools.product(
            slices, _AGAIN, (None, 256 * ways)
        ):
            one = dataclasses.replace(
                changed,
                optimizer=dataclasses.replace(
                    settings.optimizer, accumulate=accumulate
                ),
                student=dataclasses.replace(settings.student, remat=remat),
                objective=dataclasses.replace(
                    settings.objective,
                    chunk_size=chunk or settings.objective.chunk_size,
                ),
            )
            found.append((estimate(one, chip, count), one))
    return iter(sorted(found, key=lambda pair: pair[0]))


def meshes(settings: Settings, devices: int) -> list[Any]:
    """Meshes of so many devices that the batches divide over."""
    out = []
    devices //= settings.mesh.sequence  # kept as it is
    for fsdp, tensor, expert in itertools.product(_divisors(devices), repeat=3):
        used = fsdp * tensor * expert
        if devices % used:
            continue
        ways = devices // tensor
        if settings.data.batch_size % ways or settings.eval.batch_size % ways:
            continue
        mesh = dataclasses.replace(
            settings.mesh,
            data=devices // used,
            fsdp=fsdp,
            tensor=tensor,
            expert=expert,
        )
        out.append(mesh)
    return out


def estimate(settings: Settings, chip: Chip, devices: int) -> float:
    """Seconds of a step, without compiling it; to order candidates by.

    Products at the peak, every token's parameters read from memory once, and
    what the mesh sends: parameters gathered over fsdp for every token that is
    decoded (as ``rollout.sharding`` and ``objective.branch_sharding`` say) and
    every slice that is learnt from, activations summed over tensor. A teacher
    on its own mesh takes its time after the student's, one of
    ``teacher_mesh.parts``.

    Args:
      settings: of the run.
      chip: a device.
      devices: how many the student has.
    """
    student, teachers = decoder_configs(settings)
    work = phase_work(settings, student, teachers)
    mesh, new = settings.mesh, settings.rollout.max_new_tokens
    other, own = settings.teacher_mesh, settings.teacher_mesh.devices
    again = 1.0 + _AGAIN[settings.student.remat]
    scored = [work.pop(n) for n in ("scoring", "branches") if n in work]
    tokens = sum(t for t, _ in work.values())
    flops = sum(f for name, (_, f) in work.items() if name != "update")
    flops += again * work["update"][1]
    scoring = sum(f for _, f in scored)

    def held(config: DecoderConfig, mesh: Any) -> float:
        experts = mesh.expert if config.experts else 1
        return _parameter_bytes(config) / (mesh.tensor * experts)

    learner, theirs = held(student, mesh), other if own else mesh
    once, read = _loop(settings.rollout.sharding, learner, new, mesh.fsdp)
    ahead, read_ahead = _loop(
        settings.objective.branch_sharding,
        sum(held(c, theirs) for _, c in teachers),
        settings.objective.window * settings.objective.needs_branches,
        theirs.fsdp,
    )
    spread = (mesh.fsdp - 1) / mesh.fsdp
    learnt = 3 * settings.optimizer.accumulate * learner
    sent, after = (once + learnt) * spread, 0.0
    if own:
        after = max(scoring / (own * chip.flops), read_ahead / chip.bandwidth)
        after += ahead * (other.fsdp - 1) / other.fsdp / chip.link
    else:
        flops, read = flops + scoring, read + read_ahead
        sent += ahead * spread
        tokens += sum(t for t, _ in scored)
    if mesh.tensor > 1:
        tokens /= devices / mesh.tensor
        sent += 4 * 2 * tokens * student.layers * student.width
    work_seconds = max(flops / (devices * chip.flops), read / chip.bandwidth)
    return work_seconds + sent / chip.link + after / other.parts


def _loop(
    rules: str, parameters: float, tokens: int, fsdp: int
) -> tuple[float, float]:
    """Bytes of parameters that a loop over tokens gathers, and reads."""
    gathers = {"train": tokens, "gathered": 1}.get(rules, 0)
    return gathers * parameters, tokens * parameters / (1 if gathers else fsdp)


def _parameter_bytes(config: DecoderConfig) -> float:
    """In bfloat16, as they are computed with."""
    table = parameter_table(config)
    return 2.0 * sum(math.prod(row.shape) for row in table.values())


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
