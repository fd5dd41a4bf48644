"""How often the loops of a compiled program run.

A ``jax.lax.scan`` becomes a ``while`` whose condition compares a counter with
a constant; where XLA does not write the trip count down it is read from
there. The few integers that this needs (constants, counters, what loops hand
on) are followed through the program. Ours.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from topd_jax.planning.hlo import Computation, Instruction, Program

# Instruction -> the integer it is known to be, or of a tuple, place -> that;
# "" is what the computation was given.
Values = Mapping[str, Any]

_SAME = {
    "copy", "bitcast", "convert", "reshape", "copy-start", "copy-done",
    "opt-barrier", "broadcast",
}  # fmt: skip

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """How often a loop runs.

    Attributes:
      count: iterations, at the most.
      exact: whether it cannot end earlier.
      counter: which element of its state counts; None where unknown.
      end: the counter's last value; None where unknown.
      invariants: element of its state -> integer that it always is.
    """

    count: int
    exact: bool
    counter: int | None
    end: int | None
    invariants: dict[int, int]


def values_in(program: Program, place: Computation, given: Values) -> Values:
    """The integers that are known in a computation.

    Args:
      program: it is in.
      place: the computation.
      given: "" -> elements of its first parameter.

    Returns:
      Instruction -> integer, or place in a tuple -> integer.
    """
    known: dict[str, Any] = {}
    for one in place.instructions.values():
        value = _value(program, place, one, known, given)
        if value is not None:
            known[one.name] = value
    return known


def _value(
    program: Program,
    place: Computation,
    one: Instruction,
    known: dict[str, Any],
    given: Values,
) -> Any:
    sources = [known.get(name) for name in one.operands]
    if one.op == "constant":
        scalar = one.arrays and one.arrays[0].shape == ()
        literal = one.operands[0] if one.operands else ""
        return int(literal) if scalar and _is_int(literal) else None
    if one.op == "parameter":
        return given.get("") if one.operands == ("0",) else None
    if one.op == "tuple":
        return {i: v for i, v in enumerate(sources) if isinstance(v, int)}
    if one.op == "get-tuple-element" and isinstance(sources[0], dict):
        return sources[0].get(_index(one))
    if one.op == "while":
        loop = trips(program, place, one, known)
        ends = {} if loop.end is None else {loop.counter: loop.end}
        return loop.invariants | ends
    if one.op in _SAME:
        return sources[0]
    numbers = [v for v in sources if isinstance(v, int)]
    if one.op in _ARITHMETIC and len(numbers) == 2:
        return _ARITHMETIC[one.op](*numbers)
    if one.op in ("fusion", "call") and len(numbers) == len(sources):
        (name,) = one.called("calls") or one.called("to_apply")
        return _result(program, program.computations[name], sources)
    return None


def _result(program: Program, place: Computation, given: list[int]) -> Any:
    """The integer that a computation makes of integers; None: unknown."""
    known: dict[str, Any] = {}
    for one in place.instructions.values():
        if one.op == "parameter":
            value = given[int(one.operands[0])]
        else:
            value = _value(program, place, one, known, {})
        if value is not None:
            known[one.name] = value
    return known.get(place.root.name)


def trips(
    program: Program, place: Computation, one: Instruction, known: Values
) -> Loop:
    """How often a loop runs.

    Args:
      program: it is in.
      place: its computation.
      one: a ``while``.
      known: of :func:`values_in`.

    Returns:
      The loop; one iteration, not exact, where no counter is found.
    """
    (body,) = (program.computations[n] for n in one.called("body"))
    (test,) = (program.computations[n] for n in one.called("condition"))
    start = known.get(one.operands[0])
    start = start if isinstance(start, dict) else {}
    steps = _steps(program, body)
    invariants = {i: v for i, v in start.items() if steps.get(i) == 0}

    def state(index: int) -> _Side:
        if index in invariants:
            return _Side(None, invariants[index])
        return _Side(index, 0)

    def element(name: str) -> _Side | None:
        return _element(program, test, name, state)

    found = _comparison(program, test, element)
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
    if found is None:
        count = int(noted[1]) if noted else 1
        return Loop(count, noted is not None, None, None, invariants)
    counter, end, exact = found
    step = abs(steps.get(counter) or 1)
    count = max(-(-(end - start.get(counter, 0)) // step), 0)
    if noted:
        count, exact = int(noted[1]), True
    return Loop(count, exact, counter, end, invariants)


def _steps(program: Program, body: Computation) -> dict[int, int]:
    """State element -> what an iteration adds to it, where that is known."""
    if body.root.op != "tuple":
        return {}
    steps = {}
    for index, name in enumerate(body.root.operands):
        side = _element(program, body, name, lambda i: _Side(i, 0))
        if side is not None and side.state == index:
            steps[index] = side.value
    return steps


class _Side(NamedTuple):
    """One side of a comparison: an integer, or a state element and a bit."""

    state: int | None  # place in the loop's state; None: a plain integer
    value: int  # the integer, or what is added to the element


def _comparison(
    program: Program,
    place: Computation,
    element: Callable[[str], _Side | None],
) -> tuple[int, int, bool] | None:
    """(counter, its end, whether nothing else is tested) of a condition."""
    for one in place.instructions.values():
        if one.op == "compare":
            way = re.search(r"direction=(\w+)", one.attributes)[1]
            left, right = (element(name) for name in one.operands)
            if way == "GT":
                left, right, way = right, left, "LT"
            if None in (left, right) or way not in ("LT", "NE"):
                continue
            if left.state is not None and right.state is None:
                end = right.value - left.value
                return left.state, end, _is_result(place, one)
        elif one.op == "fusion":
            (name,) = one.called("calls")
            inner = program.computations[name]

            def passed(index: int, outer: Instruction = one) -> _Side | None:
                return element(outer.operands[index])

            def inside(
                name: str, inner: Computation = inner, given: Any = passed
            ) -> _Side | None:
                return _element(program, inner, name, given)

            found = _comparison(program, inner, inside)
            if found is not None:
                return (*found[:2], found[2] and _is_result(place, one))
    return None


def _element(
    program: Program,
    place: Computation,
    name: str,
    given: Callable[[int], _Side | None],
) -> _Side | None:
    """What a value is; ``given`` tells it of what was passed in."""
    one = _origin(place, name)
    if (value := _constant(place, one.name)) is not None:
        return _Side(None, value)
    if one.op == "parameter":
        return given(int(one.operands[0]))
    if one.op == "get-tuple-element":
        return given(_index(one))
    if one.op in ("fusion", "call"):
        (inner,) = one.called("calls") or one.called("to_apply")
        inner = program.computations[inner]
        if inner.root.op == "tuple":
            return None
        return _element(
            program,
            inner,
            inner.root.name,
            lambda i: _element(program, place, one.operands[i], given),
        )
    if one.op == "add":
        sides = [_element(program, place, n, given) for n in one.operands]
        states = [s for s in sides if s is not None and s.state is not None]
        if None not in sides and len(states) < 2:
            total = sum(s.value for s in sides)
            return _Side(states[0].state if states else None, total)
    return None


def _origin(place: Computation, name: str) -> Instruction:
    one = place.instructions[name]
    while one.op in _SAME and one.operands[0] in place.instructions:
        one = place.instructions[one.operands[0]]
    return one


def _is_result(place: Computation, one: Instruction) -> bool:
    return one.root or _origin(place, place.root.name).name == one.name


def _constant(place: Computation, name: str) -> int | None:
    one = _origin(place, name)
    if one.op == "constant" and one.operands and _is_int(one.operands[0]):
        return int(one.operands[0])
    return None


def _index(one: Instruction) -> int:
    return int(re.search(r"index=(\d+)", one.attributes)[1])


def _is_int(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None
