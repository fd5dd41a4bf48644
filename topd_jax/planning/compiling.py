"""Compiles one program for devices that need not exist, and asks what it needs.

Memory is what the TPU compiler says; what is alive on the devices beside a
program's arguments is added. Ours.
"""

import dataclasses
import functools
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from topd_jax.planning import hlo, hlo_cost
from topd_jax.planning.chips import Chip
from topd_jax.planning.hlo_cost import Cost
from topd_jax.planning.hlo_heaviest import Heavy, heaviest
from topd_jax.planning.programs import Call, bytes_held

# Of a device's memory the runtime keeps some; the compiler of v5e counts with
# 15.75 of 16 GiB.
USABLE = 0.98

# What else is alive on the devices while a program runs, by the program that
# made it: the teacher and the train state always are.
_ALIVE = {
    "rollout": (),
    "annotate": ("rollout",),
    "join": (),
    "read": (),
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
      largest: its largest buffers, "2.32 GiB f32[8000,151936]".
      heaviest: operations that move or send the most, where asked for.
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
    largest: tuple[str, ...] = ()
    heaviest: tuple[Heavy, ...] = ()

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


def compile_program(
    name: str, run: dict[str, Call], chip: Chip, explain: int = 0
) -> ProgramPlan:
    """Compiles one program of a run and reads what the compiler tells.

    Args:
      name: of the program.
      run: of :func:`topd_jax.planning.programs.calls`.
      chip: a device it is compiled for.
      explain: how many of its heaviest operations to tell.

    Returns:
      What it needs and does.
    """
    call = run[name]
    given = bytes_held(call.args)
    alive = _alive(name, run)
    base = dict(name=name, capacity=USABLE * chip.memory)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="topd-plan-") as name_of:
        folder = pathlib.Path(name_of)
        try:
            compiled, text = compile_call(call, folder)
        except jax.errors.JaxRuntimeError as error:
            # The compiler refuses what is larger than a chip, and says why.
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
                largest=largest_buffers(folder),
            )
        base |= dict(largest=largest_buffers(folder))
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    arguments = float(memory.argument_size_in_bytes)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = hlo.parse(text)
    return ProgramPlan(
        **base,
        arguments=arguments,
        elsewhere=max(alive - arguments, 0.0),
        temporaries=float(memory.temp_size_in_bytes),
        results=float(max(results, 0)),
        code=float(memory.generated_code_size_in_bytes),
        cost=hlo_cost.count(program),
        seconds=seconds,
        heaviest=heaviest(program, explain) if explain else (),
    )


def compile_call(call: Call, folder: pathlib.Path) -> tuple[Any, str]:
    """Compiles a program.

    Args:
      call: the program, and the shapes it is called with.
      folder: where the compiler writes its notes.

    Returns:
      The compiled program, and its text.
    """
    with jax.set_mesh(call.mesh):
        compiled = call.fn.lower(*call.args).compile(
            compiler_options={
                "xla_dump_to": str(folder),
                "xla_dump_hlo_as_text": True,
            }
        )
    # The compiler's own text: where it is newer than this JAX, it writes
    # operations that JAX cannot read.
    written = sorted(folder.glob("*.after_codegen.txt"))
    if written:
        return compiled, written[-1].read_text(encoding="utf-8")
    return compiled, compiled.as_text()


def largest_buffers(folder: pathlib.Path, count: int = 4) -> tuple[str, ...]:
    """The largest buffers in the compiler's report of a program's memory.

    Args:
      folder: where the compiler wrote it; () where it did not.
      count: how many.

    Returns:
      "2.32 GiB f32[8000,151936]" and so on; what shares a buffer is listed.
    """
    reports = sorted(folder.glob("*memory-usage-report.txt"))
    if not reports:
        return ()
    rows = re.findall(
        r"^\s*[\d.]+\w+\(\s*\d+%\);\s*([\d.]+)(\w+);.*;\s*([^;\n]+)$",
        reports[-1].read_text(encoding="utf-8"),
        re.M,
    )
    return tuple(
        f"{size} {unit} {shapes[:100]}" for size, unit, shapes in rows[:count]
    )


def _alive(name: str, run: dict[str, Call]) -> float:
    """Bytes a device holds while a program runs, its arguments included."""
    held = functools.partial(bytes_held, mesh=run[name].mesh)
    state, head, *_, frozen = run["update"].args
    teacher = [run["annotate"].args[1]]
    if run["annotate"].mesh != run["update"].mesh:
        teacher.append(head)  # a copy of its own
    if name == "restore":  # the loaded student, beside the state made of it
        return held((teacher, run["restore"].args))
    total = held((state, teacher, frozen)) + held(run[name].beside)
    prompts = run["evaluate" if name == "evaluate" else "rollout"].args
    total += held(prompts[1 if name == "evaluate" else 2])
    for made in _ALIVE[name]:
        # What rollout and annotate make is what update reads.
        total += held(run["update"].args[2 if made == "rollout" else 3])
    return total


def used_bytes(text: str) -> float:
    """Bytes that the compiler's refusal says a program would use; 0: none."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", text)
    if not found:
        return 0.0
    unit = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}[found[2]]
    return float(found[1]) * 2.0 ** (10 * unit)
