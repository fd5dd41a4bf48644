"""A plan of memory and time for a TPU pod, made without the pod.

Every program of a run is compiled by the TPU compiler for a topology, from
shapes alone (:mod:`topd_jax.analysis.programs`). The compiler tells each
program's memory; what it does is counted from the compiled program, loops as
often as they run (:mod:`topd_jax.analysis.hlo_cost`). A phase takes at least

    max(operations / peak, bytes / HBM bandwidth, bytes sent / link bandwidth)

seconds, the roofline, with a chip's published peaks; loops over tokens run to
``rollout.max_new_tokens``, as if no row ended earlier. Ours.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from topd_jax import sharding
from topd_jax.analysis import hlo, hlo_cost
from topd_jax.analysis.chips import Chip, chip_of
from topd_jax.analysis.hlo_cost import Cost
from topd_jax.analysis.programs import (
    Call,
    bytes_held,
    calls,
    decoder_configs,
    topology_devices,
)
from topd_jax.analysis.useful import phase_work
from topd_jax.settings import Settings

# Of a device's memory the runtime keeps some; the compiler of v5e counts with
# 15.75 of 16 GiB.
USABLE = 0.98

# What else is alive on the devices while a program runs, by the program that
# made it: the teacher and the train state always are.
_ALIVE = {
    "rollout": (),
    "annotate": ("rollout",),
    "statistics": ("rollout", "annotate"),
    "update": ("rollout", "annotate"),
    "evaluate": (),
    "restore": (),
}


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What the compiler says of one program, a device.

    Attributes:
      name: of the program.
      arguments: bytes of its arguments.
      elsewhere: bytes that are alive and not its arguments.
      temporaries: bytes of intermediate results.
      results: bytes of results that take no argument's place.
      code: bytes of the program itself.
      capacity: bytes that may be used.
      cost: what it does; None where it did not compile.
      seconds: that compiling took.
      error: what the compiler says where the program does not fit at all.
    """

    name: str
    arguments: float
    elsewhere: float
    temporaries: float
    results: float
    code: float
    capacity: float
    cost: Cost | None
    seconds: float
    error: str = ""

    @property
    def total(self) -> float:
        """Bytes in use while it runs."""
        return (
            self.arguments
            + self.elsewhere
            + self.temporaries
            + self.results
            + self.code
        )

    @property
    def excess(self) -> float:
        """Bytes that are missing; negative where it fits."""
        return self.total - self.capacity

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return not self.error and self.excess <= 0


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
      step_seconds: the sum of its phases.
      overhead: of looking ahead, as a share of a step without; None where
        nothing looks ahead or some program does not fit.
      generated: tokens that a step generates.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    phases: tuple[PhasePlan, ...]
    step_seconds: float
    overhead: float | None
    generated: int

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
) -> Plan:
    """Compiles a run for a topology.

    Args:
      settings: of the run.
      topology: kind and shape, "v5e:2x4".
      only: names of the programs to compile; () compiles all. Without all of
        them there are no phases.
      say: told of every program before it is compiled.

    Returns:
      The plan.

    Raises:
      ValueError: for a topology or a model that is not known, or what does
        not divide over the mesh.
    """
    devices = topology_devices(topology)
    chip = chip_of(devices)
    mesh = sharding.make_mesh(
        **dataclasses.asdict(settings.mesh), devices=devices
    )
    with jax.set_mesh(mesh):
        run = calls(settings, mesh)
        names = [n for n in run if not only or n in only]
        made = {n: _compiled(n, run, chip, say) for n in names}
        plain = _without_looking_ahead(settings, mesh, chip, say, made, only)
    phases, overhead = (), None
    if not only and all(p.cost is not None for p in made.values()):
        phases, overhead = _phases(settings, chip, made, plain, mesh.size)
    rows = settings.data.batch_size * settings.data.samples
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(mesh.shape),
        programs=tuple(made.values()),
        phases=phases,
        step_seconds=sum(p.seconds for p in phases),
        overhead=overhead,
        generated=rows * settings.rollout.max_new_tokens,
    )


def _without_looking_ahead(
    settings: Settings,
    mesh: Mesh,
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
    run = calls(dataclasses.replace(settings, objective=objective), mesh)
    return {
        name: _compiled(name, run, chip, say, of="opd")
        for name in ("annotate", "update")
    }


def _compiled(
    name: str,
    run: dict[str, Call],
    chip: Chip,
    say: Callable[[str], None],
    of: str = "",
) -> ProgramPlan:
    """Compiles one program of a run and reads what the compiler tells."""
    say(f"compiling {name}" + f" ({of})" * bool(of))
    call = run[name]
    given = bytes_held(call.args)
    alive = _alive(name, run)
    base = dict(name=name, capacity=USABLE * chip.memory)
    started = time.perf_counter()
    try:
        compiled = call.fn.lower(*call.args).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses what is larger than a chip, and says how much.
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        return ProgramPlan(
            **base,
            arguments=given,
            elsewhere=max(alive - given, 0.0),
            temporaries=max(used_bytes(text) - given, 0.0),
            results=0.0,
            code=0.0,
            cost=None,
            seconds=time.perf_counter() - started,
            error=text[:2000],
        )
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    arguments = float(memory.argument_size_in_bytes)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return ProgramPlan(
        **base,
        arguments=arguments,
        elsewhere=max(alive - arguments, 0.0),
        temporaries=float(memory.temp_size_in_bytes),
        results=float(max(results, 0)),
        code=float(memory.generated_code_size_in_bytes),
        cost=hlo_cost.count(hlo.parse(compiled.as_text())),
        seconds=seconds,
    )


def _alive(name: str, run: dict[str, Call]) -> float:
    """Bytes a device holds while a program runs, its arguments included."""
    state = run["update"].args[0]
    teacher = run["annotate"].args[1]
    total = bytes_held((state, teacher))
    if name == "restore":  # the loaded student, beside the state made of it
        return bytes_held((teacher, run["restore"].args))
    prompts = run["evaluate" if name == "evaluate" else "rollout"].args
    total += bytes_held(prompts[1 if name == "evaluate" else 2])
    for made in _ALIVE[name]:
        # What rollout and annotate make is what update reads.
        total += bytes_held(run["update"].args[2 if made == "rollout" else 3])
    return total


def used_bytes(text: str) -> float:
    """Bytes that the compiler's refusal says a program would use; 0: none."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", text)
    if not found:
        return 0.0
    unit = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}[found[2]]
    return float(found[1]) * 2.0 ** (10 * unit)


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
    devices: int,
) -> tuple[tuple[PhasePlan, ...], float | None]:
    """The phases of a step, and what looking ahead adds to it."""
    work = phase_work(settings, *decoder_configs(settings))
    rollout = made["rollout"].cost
    decode = rollout.bounded or Cost()
    scoring = (plain or made)["annotate"].cost
    costs = {
        "prefill": dataclasses.replace(rollout - decode, bounded=None),
        "decode": decode,
        "scoring": scoring,
        "update": made["update"].cost,
    }
    if plain:
        costs["branches"] = made["annotate"].cost - scoring
    phases = []
    for name in ("prefill", "decode", "scoring", "branches", "update"):
        if name in costs:
            seconds, bound = roofline(costs[name], chip)
            tokens, flops = work[name]
            peak = seconds * chip.flops * devices
            mfu = flops / peak if peak else 0.0
            phases.append(
                PhasePlan(name, costs[name], seconds, bound, tokens, mfu)
            )
    if not plain:
        return tuple(phases), None
    step = {p.name: p.seconds for p in phases}
    # The same step without: no branches, and the update of plain OPD.
    before = step["prefill"] + step["decode"] + step["scoring"]
    before += roofline(plain["update"].cost, chip)[0]
    return tuple(phases), sum(step.values()) / before - 1.0
