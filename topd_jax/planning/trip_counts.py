"""Trip counts of the loops in a compiled program.

A ``jax.lax.scan`` becomes a ``while`` whose condition compares a counter with
a bound. The TPU compiler does not note how often it runs, so its scalar
integers are computed, iteration by iteration, until the condition fails. What
depends on arrays is unknown: "i < n and not all done" runs n times.
"""

import dataclasses
import operator
import re
from typing import Any

from topd_jax.planning.hlo import Computation, Instruction, Program

# An integer; for a tuple the list of its values; None where it is unknown.
Value = Any

_COPIES = {
    "copy", "bitcast", "convert", "reshape", "copy-start", "copy-done",
    "opt-barrier", "broadcast",
}  # fmt: skip
_BINARY = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
}
_SCALAR = re.compile(r"[su]\d+|pred")
_INDEX = re.compile(r"index=(\d+)")
_DIRECTION = re.compile(r"direction=(\w+)")
_MOST = 10**6


@dataclasses.dataclass
class Scalars:
    """Compute the scalar integers of one call of a computation.

    Attributes:
      program: it is in.
      place: the computation.
      arguments: values of its parameters, as far as they are known.
      known: instruction -> value, of what was asked for.
    """

    program: Program
    place: Computation
    arguments: tuple[Value, ...] = ()
    known: dict[str, Value] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        """Return the value of an instruction."""
        if name not in self.known:
            one = self.place.instructions.get(name)
            worth = one is not None and _is_worth(one)
            self.known[name] = self._value(one) if worth else None
        return self.known[name]

    def loop(self, one: Instruction) -> tuple[int, Value]:
        """Run a loop.

        Args:
          one: a ``while`` of this computation.

        Returns:
          (iterations, 1 where that is unknown; the state after the last one,
          None where it is unknown).
        """
        state = self[one.operands[0]]
        body, condition = (
            self.program.computations[one.called[kind][0]]
            for kind in ("body", "condition")
        )
        for count in range(_MOST):
            goes_on = self._call(condition, state)
            if goes_on is None:
                break
            if not goes_on:
                return count, state
            state = self._call(body, state)
        return 1, None

    def _call(self, place: Computation, *arguments: Value) -> Value:
        return Scalars(self.program, place, arguments)[place.root.name]

    def _value(self, one: Instruction) -> Value:
        if one.op == "constant":
            text = one.operands[0] if one.operands else ""
            flags = {"true": 1, "false": 0}
            number = re.fullmatch(r"-?\d+", text)
            return int(text) if number else flags.get(text)
        if one.op == "parameter":
            index = int(one.operands[0])
            known = index < len(self.arguments)
            return self.arguments[index] if known else None
        if one.op == "while":
            return self.loop(one)[1]
        values = [self[name] for name in one.operands]
        if one.op == "tuple":
            return values
        if one.op == "get-tuple-element":
            index = int(_INDEX.search(one.attributes)[1])
            return values[0] and values[0][index]
        if one.op in _COPIES:
            return values[0]
        if one.op in ("fusion", "call"):
            (name,) = one.called.get("calls") or one.called["to_apply"]
            return self._call(self.program.computations[name], *values)
        return _computed(one, values)


def _is_worth(one: Instruction) -> bool:
    """Whether a result may be, or hold, a scalar integer."""
    if one.op in ("tuple", "parameter", "while", "opt-barrier"):
        return True
    return any(a.shape == () and _SCALAR.match(a.dtype) for a in one.arrays)


def _computed(one: Instruction, values: list[Value]) -> Value:
    if one.op == "and":
        # What is unknown lets the loop go on.
        known = [v for v in values if v is not None]
        return all(known) if known else None
    if None in values:
        return None
    if one.op == "compare":
        direction = _DIRECTION.search(one.attributes)[1]  # "LT"
        return getattr(operator, direction.lower())(*values)
    return _BINARY[one.op](*values) if one.op in _BINARY else None
