"""Compiles one program for devices that need not exist, and asks what it needs.

Memory is what the TPU compiler says; what is alive on the devices beside a
program's arguments is added. Ours.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from topd_jax.analysis import hlo, hlo_cost
from topd_jax.analysis.chips import Chip
from topd_jax.analysis.hlo_cost import Cost
from topd_jax.analysis.programs import Call, bytes_held

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
      largest: its largest buffers, "2.32 GiB f32[8000,151936]".
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


def compile_program(name: str, run: dict[str, Call], chip: Chip) -> ProgramPlan:
    """Compiles one program of a run and reads what the compiler tells.

    Args:
      name: of the program.
      run: of :func:`topd_jax.analysis.programs.calls`.
      chip: a device it is compiled for.

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
    return ProgramPlan(
        **base,
        arguments=arguments,
        elsewhere=max(alive - arguments, 0.0),
        temporaries=float(memory.temp_size_in_bytes),
        results=float(max(results, 0)),
        code=float(memory.generated_code_size_in_bytes),
        cost=hlo_cost.count(hlo.parse(text)),
        seconds=seconds,
    )


def compile_call(call: Call, folder: pathlib.Path) -> tuple[Any, str]:
    """Compiles a program.

    Args:
      call: the program, and the shapes it is called with.
      folder: where the compiler writes its notes.

    Returns:
      The compiled program, and its text.
    """
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
    state, *_, frozen = run["update"].args
    teacher = run["annotate"].args[1]
    total = bytes_held((state, teacher, frozen))
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
