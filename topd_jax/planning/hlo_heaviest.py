"""Where a compiled program's bytes come from: its heaviest operations. Ours."""

import dataclasses
import re
from collections.abc import Iterator

from topd_jax.planning.hlo import Instruction, Program
from topd_jax.planning.hlo_cost import Cost, Counter
from topd_jax.planning.hlo_loops import Values, trips, values_in


@dataclasses.dataclass(frozen=True)
class Heavy:
    """All operations of a kind that one line of a model was compiled to.

    Attributes:
      kind: "fusion", or that of a collective.
      source: path of JAX's operation, "jit(learn)/while/body/dot_general".
      shape: of the largest result among them, "bf16[8,2560]".
      times: that they run, on one device.
      bytes: they move from and to main memory.
      sent: bytes they send to other devices.
    """

    kind: str
    source: str
    shape: str
    times: int
    bytes: float
    sent: float


def heaviest(program: Program, count: int) -> tuple[Heavy, ...]:
    """The operations that move and those that send the most.

    Args:
      program: of :func:`topd_jax.planning.hlo.parse`.
      count: how many of each.

    Returns:
      Those that move the most first, then those that send the most, each at
      most once.
    """
    found: dict[tuple[str, str], Heavy] = {}
    largest: dict[tuple[str, str], float] = {}
    for one, times, cost in _run(Counter(program), program.entry, {}, 1):
        if not cost.bytes and not cost.sent:
            continue
        kind = next(iter(cost.collectives), one.op)
        key = kind, _source(program, one)
        old = found.get(key, Heavy(*key, "", 0, 0.0, 0.0))
        each = max(cost.bytes, cost.sent)
        shape = old.shape
        if each > largest.get(key, -1.0):
            largest[key], shape = each, _shape(one)
        found[key] = Heavy(
            *key,
            shape,
            old.times + times,
            old.bytes + times * cost.bytes,
            old.sent + times * cost.sent,
        )
    rows = list(found.values())
    moving = sorted(rows, key=lambda h: -h.bytes)[:count]
    sending = sorted(rows, key=lambda h: -h.sent)[:count]
    kept = [*moving, *(h for h in sending if h.sent and h not in moving)]
    return tuple(kept)


def _run(
    counter: Counter, name: str, given: Values, times: int
) -> Iterator[tuple[Instruction, int, Cost]]:
    """Every instruction, how often it runs, and what it does each time."""
    program = counter.program
    place = program.computations[name]
    values = values_in(program, place, given)
    for one in place.instructions.values():
        if one.op == "while":
            loop = trips(program, place, one, values)
            for inner in (*one.called("body"), *one.called("condition")):
                inside = {"": loop.invariants}
                yield from _run(counter, inner, inside, times * loop.count)
        elif one.op == "conditional":
            yield from _run(counter, counter.costliest(one), {}, times)
        elif one.op in ("call", "async-start"):
            for inner in one.called("calls") or one.called("to_apply"):
                yield from _run(counter, inner, {}, times)
        else:
            yield one, times, counter.instruction(place, one, values)


def _source(program: Program, one: Instruction) -> str:
    """Path of an instruction, or of the last one with a path in its fusion."""
    if found := re.search(r'op_name="([^"]*)"', one.attributes):
        return found[1]
    for name in one.called("calls"):
        inner = program.computations[name].instructions.values()
        paths = [p for i in inner if (p := _source(program, i))]
        if paths:
            return paths[-1]
    return ""


def _shape(one: Instruction) -> str:
    array = max(one.arrays, key=lambda a: a.size)
    return f"{array.dtype}{list(array.shape)}".replace(" ", "")
