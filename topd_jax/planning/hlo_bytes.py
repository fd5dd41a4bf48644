"""Bytes that a compiled program moves, to memory and to other devices. Ours."""

import math
import re

from topd_jax.planning.hlo import Computation, Instruction, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_SLICES = {"dynamic-slice", "slice", "gather"}


def group_size(attributes: str, devices: int) -> int:
    """How many devices a collective runs over, each group alike.

    Args:
      attributes: of the instruction; its ``replica_groups`` in any of XLA's
        three spellings.
      devices: of the program, all of which an empty list means.
    """
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    pattern = r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}"
    if named := re.search(pattern, attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # "'a':(2)4" is a part of an axis, of size 4.
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return devices


def ring_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends on a ring.

    Args:
      kind: of :data:`COLLECTIVES`.
      size: bytes of the operands on one device.
      devices: in a group.
    """
    if devices <= 1:
        return 0.0
    if kind == "all-gather":
        return size * (devices - 1)
    if kind == "collective-permute":
        return size
    factor = 2.0 if kind == "all-reduce" else 1.0
    return factor * size * (devices - 1) / devices


def is_continued(one: Instruction) -> bool:
    """Whether this only carries on a collective that another one started.

    On a TPU the fusions that run while a collective is under way, and the one
    that waits for it, name it once more.
    """
    found = re.search(r'"flag_start":"(-?\d+)"', one.attributes)
    return found is not None and found[1] != "-1"


def moved(program: Program, place: Computation, one: Instruction) -> float:
    """Bytes that an instruction reads from and writes to main memory.

    Args:
      program: it is in.
      place: its computation.
      one: the instruction; not a loop.
    """
    if one.op == "custom-call" and not one.operands:
        return 0.0  # a buffer is set aside, nothing is moved
    called = one.called("calls")
    fused = program.computations[called[0]] if called else None
    total = 0.0
    for index, name in enumerate(one.operands):
        source = place.instructions.get(name)
        if source is None or not source.bytes:
            continue  # a literal, or it lies in a faster memory
        if fused is None:
            total += _share(one, index, source)
        else:
            parameter = fused.parameter(index)
            used = _read(program, fused, parameter.name) if parameter else 0.0
            total += min(source.bytes, used)
    if fused is not None:
        return total + min(one.bytes, _written(program, fused, fused.root))
    return total + _result(place, one)


def _share(one: Instruction, index: int, source: Instruction) -> float:
    """Bytes that an operation outside fusions reads of an operand."""
    if index == 0 and one.op in _SLICES:
        return min(source.bytes, _plain(one))
    if index == 0 and one.op == "dynamic-update-slice":
        return 0.0
    return source.bytes


def _result(place: Computation, one: Instruction) -> float:
    """Bytes that an operation outside fusions writes."""
    sources = [place.instructions.get(name) for name in one.operands]
    if one.op == "dynamic-update-slice":
        return min(one.bytes, _plain(sources[1]))
    if one.op.endswith("-start"):  # its result names its operands again
        return max(one.bytes - sum(s.bytes for s in sources if s), 0.0)
    return one.bytes


def _plain(one: Instruction) -> float:
    return sum(a.bytes for a in one.arrays)


def _waits(one: Instruction) -> bool:
    return '"AsyncCollectiveDone"' in one.attributes


def _is_view(one: Instruction) -> bool:
    """Whether a fusion inside of a fusion is its operand, tiled otherwise.

    So the compiler of TPU7x reads stacked weights of which it takes a slice.
    """
    return one.op == "fusion" and "{{}: (0, {})}" in one.attributes


def _read(program: Program, place: Computation, name: str) -> float:
    """Bytes that a fusion reads of a value; infinite for all of it."""
    if place.instructions[name].root:
        return math.inf
    total = 0.0
    for user in place.users(name):
        first = user.operands[0] == name and name not in user.operands[1:]
        if user.op in _SLICES and first:
            total += _plain(user)
        elif user.op == "dynamic-update-slice" and first:
            continue  # written in place
        elif user.op == "tuple" or is_continued(user) or _waits(user):
            continue  # handed on
        elif user.op == "bitcast" or _is_view(user):
            total += _read(program, place, user.name)
        elif user.op == "fusion":
            inner = program.computations[user.called("calls")[0]]
            for index, operand in enumerate(user.operands):
                if operand == name:
                    inside = inner.parameter(index)
                    total += _read(program, inner, inside.name) if inside else 0
        else:
            return math.inf
    return total


def _written(program: Program, place: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes as (a part of) its result."""
    sources = [place.instructions.get(name) for name in one.operands]
    if one.op == "tuple":
        return sum(_written(program, place, s) for s in sources)
    if one.op == "dynamic-update-slice":
        return _plain(sources[1])
    if one.op == "parameter" or is_continued(one) or _waits(one):
        return 0.0
    if one.op == "bitcast" and sources[0].op != "parameter":
        return _written(program, place, sources[0])
    if one.op == "fusion":
        inner = program.computations[one.called("calls")[0]]
        return _written(program, inner, inner.root)
    return _plain(one)
