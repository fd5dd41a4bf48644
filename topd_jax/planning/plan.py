"""Plan the memory and time of a run on a TPU topology, without the TPU.

Every program of a run is compiled by the TPU compiler for a topology, from
shapes alone (:mod:`topd_jax.planning.programs`). The compiler tells each
program's memory. Operations and bytes are counted from the compiled program,
loops as often as they run (:mod:`topd_jax.planning.hlo_cost`). A program takes
at least

    max(operations / peak, bytes / HBM bandwidth, bytes sent / link bandwidth)

seconds, the roofline, with a chip's published peaks, and about
:func:`expected` seconds in practice. Loops over tokens run to
``rollout.max_new_tokens``, as if no row ended earlier.
"""

import dataclasses
import math
import pathlib
import re
import sys
import tempfile
from operator import mul
from typing import Any

import jax

from topd_jax.objectives.loading import make_objective
from topd_jax.planning.chips import DECODED, Chip, chip_of, topology_devices
from topd_jax.planning.hlo import parse
from topd_jax.planning.hlo_cost import Cost, count
from topd_jax.planning.programs import Call, calls
from topd_jax.training.config import Settings
from topd_jax.training.placement import check_batches, make_run_mesh
from topd_jax.training.shapes import bytes_held

# The runtime keeps some of a device's memory; the compiler of v5e counts with
# 15.75 of 16 GiB.
USABLE = 0.98
_STEP = ("rollout", "score", "train_step", "score 2", "train_step 2")


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """Hold what one program needs and does, on a device.

    Attributes:
      name: of the program.
      held: bytes that are on the device anyway: its arguments, and whatever
        else of the run.
      temporaries: bytes of intermediate results, of results that take no
        argument's place, and of the program itself.
      capacity: bytes that may be used.
      cost: what it does; None if the compiler refused it for its memory.
      calls: how often the whole run calls it.
    """

    name: str
    held: float
    temporaries: float
    capacity: float
    cost: Cost | None
    calls: int = 1

    @property
    def total(self) -> float:
        """Return the bytes in use while it runs."""
        return self.held + self.temporaries

    @property
    def excess(self) -> float:
        """Return the bytes that are missing; negative if it fits."""
        return self.total - self.capacity

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.cost is not None and self.excess <= 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hold the plan of a run on a topology.

    Attributes:
      topology: as given, "v5e:2x4".
      chip: a device of it.
      mesh: axis -> size.
      programs: in the order of a step.
      generated: tokens that a step generates.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    generated: int

    @property
    def failing(self) -> tuple[ProgramPlan, ...]:
        """Return the programs that do not run."""
        return tuple(p for p in self.programs if not p.fits)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Return a mean step's (least, expected) seconds.

        0 if not all programs compiled.
        """
        of_step = [p for p in self.programs if p.name in _STEP]
        if None in [p.cost for p in of_step]:
            return 0.0, 0.0
        often = [p.calls / of_step[0].calls for p in of_step]
        least = (roofline(p.cost, self.chip)[0] for p in of_step)
        about = (expected(p.cost, self.chip) for p in of_step)
        return sum(map(mul, often, least)), sum(map(mul, often, about))


def make_plan(settings: Settings, topology: str) -> Plan:
    """Compile a run for a topology; say so on stderr, program by program.

    Args:
      settings: of the run.
      topology: kind and shape, "v5e:2x4".

    Returns:
      The plan.

    Raises:
      ValueError: for a topology or a model that is not known, or what does
        not divide over the mesh.
    """
    devices = topology_devices(topology)
    chip = chip_of(devices)
    mesh = make_run_mesh(settings, devices, chip.memory)
    check_batches(settings, mesh)
    programs = []
    with jax.set_mesh(mesh):
        for name, call in calls(settings, mesh).items():
            print(f"compiling {name}", file=sys.stderr, flush=True)
            program = _compile(name, call, USABLE * chip.memory)
            often = _calls(settings, name)
            programs.append(dataclasses.replace(program, calls=often))
    rows = settings.data.batch_size * settings.data.samples
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(mesh.shape),
        programs=tuple(programs),
        generated=rows * settings.rollout.max_new_tokens,
    )


def roofline(cost: Cost, chip: Chip) -> tuple[float, str]:
    """Return the least seconds that work takes, and what it is bound by.

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


def expected(cost: Cost, chip: Chip) -> float:
    """Return the seconds that work takes at what such programs reach.

    The roofline, divided by the published share of what bounds it (sources in
    :mod:`topd_jax.planning.chips`).

    Args:
      cost: of one device.
      chip: the device.
    """
    seconds, bound = roofline(cost, chip)
    return seconds / (chip.trained if bound == "compute" else DECODED)


def _calls(settings: Settings, name: str) -> int:
    """Return how often a run calls a program; evaluations as ``topd eval``."""
    if name in ("evaluate", "compare"):
        options = settings.eval
        batches = math.ceil(options.final_problems / options.batch_size)
        return batches * options.samples
    if name == "statistics":
        return settings.train.steps // settings.log.statistics_every
    steps = settings.train.steps
    if settings.is_offline or name == "rollout":
        return steps
    guided = make_objective(settings.objective).phases(steps)[0][0]
    return steps - guided if name.endswith(" 2") else guided


def _compile(name: str, call: Call, capacity: float) -> ProgramPlan:
    """Compile a program and read what the compiler tells."""
    arguments, live = bytes_held(call.args), bytes_held(call.live)
    cost = None
    with tempfile.TemporaryDirectory(prefix="topd-plan-") as directory:
        try:
            memory, text = _compiled(call, pathlib.Path(directory))
        except jax.errors.JaxRuntimeError as error:
            # The compiler refuses what is larger than a chip, and says why.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            temporaries = refused_bytes(str(error), arguments)
        else:
            arguments = memory.argument_size_in_bytes
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            temporaries = memory.temp_size_in_bytes + max(results, 0)
            temporaries += memory.generated_code_size_in_bytes
            cost = Cost().plus(count(parse(text)), call.times)
    held = max(live, arguments)
    return ProgramPlan(name, held, temporaries, capacity, cost)


def _compiled(call: Call, folder: pathlib.Path) -> tuple[Any, str]:
    """Compile; return the compiler's memory statistics and program text."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    compiled = call.fn.lower(*call.args).compile(compiler_options=options)
    # The compiler's own text: where it is newer than this JAX, it writes
    # operations that JAX cannot read.
    texts = sorted(folder.glob("*.after_codegen.txt"))
    text = texts[-1].read_text("utf-8") if texts else compiled.as_text()
    return compiled.memory_analysis(), text


def refused_bytes(text: str, arguments: float) -> float:
    """Read the bytes of temporaries from a compiler's refusal.

    Args:
      text: "Used 25.06G of 15.75G hbm", arguments included, or "the total
        memory required for HLO temporaries (16.91G) exceeds ...".
      arguments: bytes of the program's arguments.

    Returns:
      Bytes; 0 if the text does not tell.
    """
    pattern = r"(Used |temporaries\s+\()([\d.]+)([KMGT]?)(?:\s+of|\))"
    match = re.search(pattern, text)
    if not match:
        return 0.0
    size = float(match[2]) * 2.0 ** (10 * " KMGT".index(match[3] or " "))
    return max(size - arguments, 0.0) if match[1] == "Used " else size
