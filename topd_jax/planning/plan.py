"""A plan of memory and time for a TPU pod, made without the pod.

Every program of a run is compiled by the TPU compiler for a topology, from
shapes alone (:mod:`topd_jax.planning.programs`). The compiler tells each
program's memory; what it does is counted from the compiled program, loops as
often as they run (:mod:`topd_jax.planning.hlo_cost`). A phase takes at least

    max(operations / peak, bytes / HBM bandwidth, bytes sent / link bandwidth)

seconds, the roofline, with a chip's published peaks; loops over tokens run to
``rollout.max_new_tokens``, as if no row ended earlier. With a teacher on its
own devices and p parts of the batch, of which each takes w to write and s to
score, the first half of a step takes w + (p - 1) max(w, s) + s; what moves
between the meshes is told beside it. Ours.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from topd_jax.parallel.teacher_mesh import make_meshes
from topd_jax.planning.chips import Chip, chip_of, fits_one_host
from topd_jax.planning.compiling import ProgramPlan, compile_program
from topd_jax.planning.hlo_cost import Cost
from topd_jax.planning.programs import (
    Call,
    calls,
    decoder_configs,
    topology_devices,
)
from topd_jax.planning.useful import phase_work
from topd_jax.training.config import Settings


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """What one phase of a step does and takes at the least, a device.

    Attributes:
      name: of the phase.
      cost: operations and bytes.
      seconds: the roofline.
      bound: what it is bound by: "compute", "memory" or "links".
      tokens: that it works on, over all devices.
      mfu: share of the devices' peak that the model's own operations make,
        without what is computed again.
    """

    name: str
    cost: Cost
    seconds: float
    bound: str
    tokens: int
    mfu: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology.

    Attributes:
      topology: as given, "v5e:2x4".
      chip: a device of it.
      mesh: axis -> size.
      programs: in the order of a step.
      phases: of a step.
      step_seconds: the sum of its phases; less where they overlap.
      overhead: of looking ahead, as a share of a step without; None where
        nothing looks ahead or some program does not fit.
      generated: tokens that a step generates.
      teacher_mesh: axis -> size; None where it is ``mesh``.
      parts: of a batch, each scored while the next is written.
      moved: bytes of the annotations that a step moves between the meshes.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    phases: tuple[PhasePlan, ...]
    step_seconds: float
    overhead: float | None
    generated: int
    teacher_mesh: dict[str, int] | None = None
    parts: int = 1
    moved: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether every program runs."""
        return all(p.fits for p in self.programs)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of a step over its time; 0 where unknown."""
        if not self.step_seconds:
            return 0.0
        return self.generated / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; bytes and seconds."""
        out = dataclasses.asdict(self)
        for name in ("fits", "tokens_per_second"):
            out[name] = getattr(self, name)
        for row, program in zip(out["programs"], self.programs, strict=True):
            row |= {n: getattr(program, n) for n in ("total", "fits", "excess")}
        return out


def make_plan(
    settings: Settings,
    topology: str,
    *,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
    explain: int = 0,
) -> Plan:
    """Compiles a run for a topology.

    Args:
      settings: of the run.
      topology: kind and shape, "v5e:2x4".
      only: names of the programs to compile; () compiles all. Without all of
        them there are no phases.
      say: told of every program before it is compiled.
      explain: how many of each program's heaviest operations to tell.

    Returns:
      The plan.

    Raises:
      ValueError: for a topology or a model that is not known, or what does
        not divide over the mesh.
    """
    devices = topology_devices(topology)
    chip = chip_of(devices)
    both = make_meshes(
        settings.mesh,
        settings.teacher_mesh,
        devices=devices,
        one_process=fits_one_host(devices),
    )
    mesh, theirs = both
    with jax.set_mesh(mesh):
        run = calls(settings, mesh, theirs)
        names = [n for n in run if not only or n in only]
        made = _compiled(names, run, chip, say, explain=explain)
        plain = _without_looking_ahead(settings, both, chip, say, made, only)
    phases, seconds, overhead, moved = (), 0.0, None, 0.0
    if not only and all(p.cost is not None for p in made.values()):
        phases, seconds, overhead = _phases(settings, chip, made, plain, both)
    if theirs is not None:
        moved = sum(
            math.prod(x.shape) * x.dtype.itemsize
            for x in jax.tree.leaves(run["update"].args[3])
        )
    rows = settings.data.batch_size * settings.data.samples
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(mesh.shape),
        programs=tuple(made.values()),
        phases=phases,
        step_seconds=seconds,
        overhead=overhead,
        generated=rows * settings.rollout.max_new_tokens,
        teacher_mesh=None if theirs is None else dict(theirs.shape),
        parts=settings.teacher_mesh.parts,
        moved=moved,
    )


def _without_looking_ahead(
    settings: Settings,
    meshes: tuple[Mesh, Mesh | None],
    chip: Chip,
    say: Callable[[str], None],
    made: dict[str, ProgramPlan],
    only: tuple[str, ...],
) -> dict[str, ProgramPlan]:
    """Scoring and update of plain OPD, to tell what looking ahead costs."""
    fits = all(p.cost is not None for p in made.values())
    if only or not fits or not settings.objective.pieces.looks_ahead:
        return {}
    objective = dataclasses.replace(settings.objective, variant="opd")
    run = calls(dataclasses.replace(settings, objective=objective), *meshes)
    return _compiled(("annotate", "update"), run, chip, say, " of plain OPD")


def _compiled(
    names: Sequence[str],
    run: dict[str, Call],
    chip: Chip,
    say: Callable[[str], None],
    what: str = "",
    explain: int = 0,
) -> dict[str, ProgramPlan]:
    made = {}
    for name in names:
        say(f"compiling {name}{what}")
        made[name] = compile_program(name, run, chip, explain)
    return made


def roofline(cost: Cost, chip: Chip) -> tuple[float, str]:
    """The least seconds that work takes, and what it is bound by.

    Args:
      cost: of one device.
      chip: the device.

    Returns:
      (seconds, "compute", "memory" or "links").
    """
    times = {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "links": cost.sent / chip.link,
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def _phases(
    settings: Settings,
    chip: Chip,
    made: dict[str, ProgramPlan],
    plain: dict[str, ProgramPlan],
    meshes: tuple[Mesh, Mesh | None],
) -> tuple[tuple[PhasePlan, ...], float, float | None]:
    """The phases, seconds of a step, and what looking ahead adds to it."""
    work = phase_work(settings, *decoder_configs(settings))
    parts = settings.teacher_mesh.parts
    rollout = made["rollout"].cost.times(parts)
    decode = rollout.bounded or Cost()
    scoring = (plain or made)["annotate"].cost.times(parts)
    costs = {
        "prefill": dataclasses.replace(rollout - decode, bounded=None),
        "decode": decode,
        "scoring": scoring,
        "update": made["update"].cost,
    }
    if plain:
        costs["branches"] = made["annotate"].cost.times(parts) - scoring
    phases = []
    for name in ("prefill", "decode", "scoring", "branches", "update"):
        if name in costs:
            seconds, bound = roofline(costs[name], chip)
            tokens, flops = work[name]
            mesh, theirs = meshes
            if theirs is not None and name in ("scoring", "branches"):
                mesh = theirs
            peak = seconds * chip.flops * mesh.size
            mfu = flops / peak if peak else 0.0
            phases.append(
                PhasePlan(name, costs[name], seconds, bound, tokens, mfu)
            )
    step = {p.name: p.seconds for p in phases}
    total = step_seconds(step, parts)
    if not plain:
        return tuple(phases), total, None
    # The same step without: no branches, and the update of plain OPD.
    update = roofline(plain["update"].cost, chip)[0]
    before = step_seconds(step | {"branches": 0.0, "update": update}, parts)
    return tuple(phases), total, total / before - 1.0


def step_seconds(phases: Mapping[str, float], parts: int) -> float:
    """Seconds of a step whose batch goes through in parts.

    Args:
      phases: name -> seconds of the whole batch.
      parts: each is scored while the next is written; 1: nothing overlaps.
    """
    write = (phases["prefill"] + phases["decode"]) / parts
    score = (phases["scoring"] + phases.get("branches", 0.0)) / parts
    first = write + (parts - 1) * max(write, score) + score
    return first + phases["update"]
