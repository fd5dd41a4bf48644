"""Counts what one device does in a compiled program, loops and all.

XLA's own ``cost_analysis`` takes the body of a loop once, and a model is a
loop over layers inside a loop over tokens. Here every ``while`` counts as often
as it runs: XLA's note of its trip count where there is one, else the bound
that its condition compares a counter with. A loop that may end earlier
(``i < n and not all done``) counts n times: an upper bound, kept apart as
``bounded``. Ours.

* Floating-point operations: matrix products (``dot``, ``convolution``, and a
  multiplication that is summed at once), 2 a multiplication; custom calls by
  the estimate their kernel gives. Elementwise work is left out.
* Bytes moved: what every fusion and every operation outside one reads from
  and writes to main memory. Of an array that is only sliced, or written in
  place, the slice counts.
* Collective bytes: what a device sends on a ring, (n - 1) / n of the array
  for gather, scatter and all-to-all, twice that for an all-reduce.
"""

import dataclasses
import functools
from collections.abc import Mapping

from topd_jax.planning.hlo import Computation, Instruction, Program
from topd_jax.planning.hlo_bytes import (
    COLLECTIVES,
    group_size,
    is_continued,
    moved,
    ring_bytes,
)
from topd_jax.planning.hlo_loops import Loop, Values, trips, values_in
from topd_jax.planning.hlo_products import (
    kernel_says,
    product_flops,
    summed_products,
)

# Operations that move nothing of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast",
    "after-all", "partition-id", "replica-id", "add-dependency",
    "opt-barrier", "get-dimension-size", "domain", "infeed", "outfeed",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does.

    Attributes:
      flops: floating-point operations of matrix products.
      bytes: moved from and to main memory.
      collectives: kind -> bytes sent to other devices.
      bounded: the part that lies in loops whose end depends on the data, at
        the most iterations they can run; None where there is none.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bounded: "Cost | None" = None

    def __add__(self, other: "Cost") -> "Cost":
        return self._with(other, 1.0)

    def __sub__(self, other: "Cost") -> "Cost":
        return self._with(other, -1.0)

    def times(self, count: float) -> "Cost":
        """The same work ``count`` times over."""
        return Cost()._with(self, count)

    @property
    def sent(self) -> float:
        """Bytes sent to other devices, of every kind."""
        return sum(self.collectives.values())

    def _with(self, other: "Cost", factor: float) -> "Cost":
        kinds = [
            k
            for k in COLLECTIVES
            if k in self.collectives or k in other.collectives
        ]
        bounded = self.bounded
        if other.bounded is not None:
            bounded = (bounded or Cost())._with(other.bounded, factor)
        return Cost(
            self.flops + factor * other.flops,
            self.bytes + factor * other.bytes,
            {
                k: self.collectives.get(k, 0.0)
                + factor * other.collectives.get(k, 0.0)
                for k in kinds
            },
            bounded,
        )


def count(program: Program) -> Cost:
    """What one device does in one call of a program.

    Args:
      program: of :func:`topd_jax.planning.hlo.parse`.

    Returns:
      The cost, loops counted as often as they run.
    """
    return Counter(program).computation(program.entry, {})


class Counter:
    """Walks the computations; those without loop bounds are counted once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.inside = functools.cache(self._inside)

    def computation(self, name: str, given: Values) -> Cost:
        """Everything in a computation that is not a fusion's."""
        place = self.program.computations[name]
        values = values_in(self.program, place, given)
        total = Cost()
        for one in place.instructions.values():
            total += self.instruction(place, one, values)
        return total

    def instruction(
        self, place: Computation, one: Instruction, values: Values
    ) -> Cost:
        """An instruction with all that it calls; ``values_in`` its place."""
        if one.op == "while":
            return self._loop(place, one, values)
        if one.op == "conditional":
            return self.computation(self.costliest(one), {})
        if one.op in ("call", "async-start"):
            called = one.called("calls") or one.called("to_apply")
            return sum((self.computation(n, {}) for n in called), Cost())
        if one.op in _FREE or one.op.endswith(("-done", "-update")):
            return Cost()
        work = self._work(place, one)
        read = moved(self.program, place, one)
        if one.op == "custom-call":
            # Which part of its operands it reads, the kernel alone knows.
            read = kernel_says(one, "bytes_accessed") or read
        return work + Cost(bytes=read)

    def costliest(self, one: Instruction) -> str:
        """The computation that a conditional is counted as."""
        names = one.called("branch_computations") or (
            *one.called("true_computation"),
            *one.called("false_computation"),
        )
        costs = {name: self.computation(name, {}) for name in names}
        return max(names, key=lambda n: (costs[n].flops, costs[n].bytes))

    def _loop(
        self, place: Computation, one: Instruction, values: Values
    ) -> Cost:
        loop: Loop = trips(self.program, place, one, values)
        inside = {"": loop.invariants}
        each = sum(
            (
                self.computation(name, inside)
                for kind in ("body", "condition")
                for name in one.called(kind)
            ),
            Cost(),
        )
        total = each.times(loop.count)
        if not loop.exact:
            plain = dataclasses.replace(total, bounded=None)
            total = dataclasses.replace(total, bounded=plain)
        return total

    def _work(self, place: Computation, one: Instruction) -> Cost:
        """Products and collectives of an instruction, and of what it fuses."""
        called = one.called("calls")
        if called:
            return sum((self.inside(n) for n in called), Cost())
        if one.op in ("dot", "convolution"):
            return Cost(flops=product_flops(place, one))
        if one.op == "custom-call":
            return Cost(flops=kernel_says(one, "flops"))
        if one.op == "reduce":
            return Cost(flops=summed_products(place, one))
        kind = one.op.removesuffix("-start")
        if kind in COLLECTIVES and not is_continued(one):
            size = sum(
                a.bytes
                for name in one.operands
                if name in place.instructions
                for a in place.instructions[name].arrays
            )
            sent = ring_bytes(
                kind, size, group_size(one.attributes, self.program.devices)
            )
            return Cost(collectives={kind: sent})
        return Cost()

    def _inside(self, name: str) -> Cost:
        """Products and collectives of a fusion's computation."""
        place = self.program.computations[name]
        parts = (self._work(place, i) for i in place.instructions.values())
        return sum(parts, Cost())
