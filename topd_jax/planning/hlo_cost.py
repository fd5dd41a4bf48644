"""Count what one device does in a compiled program.

XLA's own ``cost_analysis`` takes the body of a loop once, and a model is a
loop over layers inside a loop over tokens. Here every ``while`` counts as often
as it runs at the most.

Only matrix products count as floating-point operations, 2 a multiplication:
``dot``, ``convolution``, a multiplication that is summed at once (a product
with a single row), and custom calls by the estimate of their kernel.
Bytes are what every fusion and every operation outside one reads from main
memory and writes to it; of an array that is only sliced, or written in place,
the slice. Bytes sent are those of one device on a ring.
"""

import dataclasses
import functools
import math
import re

from topd_jax.planning.hlo import Computation, Instruction, Program
from topd_jax.planning.trip_counts import Scalars, Value

# Operations that move nothing themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast",
    "after-all", "partition-id", "replica-id", "add-dependency",
    "opt-barrier", "get-dimension-size", "domain", "infeed", "outfeed",
}  # fmt: skip
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "collective-permute",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, order=True)
class Cost:
    """Hold what one device does.

    Attributes:
      flops: floating-point operations of matrix products.
      bytes: moved from and to main memory.
      sent: bytes sent to other devices.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """Return this cost and ``times`` another."""
        return Cost(
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            self.sent + times * other.sent,
        )


def count(program: Program) -> Cost:
    """Count what one device does in one call of a program.

    Args:
      program: of :func:`topd_jax.planning.hlo.parse`.
    """
    return _Counter(program).computation(program.entry)


class _Counter:
    """Count the computations of a program, loops as often as they run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.fused = functools.cache(self._fused)

    def computation(self, name: str, *arguments: Value) -> Cost:
        """Count one run; of the parameters' values, what is known."""
        place = self.program.computations[name]
        scalars, total = Scalars(self.program, place, arguments), Cost()
        for one in place.instructions.values():
            called = one.called
            if one.op == "while":
                # An inner loop runs as often as in the first iteration.
                start, (times, _) = scalars[one.operands[0]], scalars.loop(one)
                for inner in (*called["body"], *called["condition"]):
                    total = total.plus(self.computation(inner, start), times)
            elif one.op == "conditional":
                branches = called.get("branch_computations") or (
                    called["true_computation"] + called["false_computation"]
                )
                total = total.plus(max(map(self.computation, branches)))
            elif one.op in ("call", "async-start"):
                known = [scalars[name] for name in one.operands]
                for inner in called.get("calls") or called["to_apply"]:
                    total = total.plus(self.computation(inner, *known))
            else:
                total = total.plus(self._cost(place, one))
        return total

    def _cost(self, place: Computation, one: Instruction) -> Cost:
        """Count one run of an instruction outside fusions."""
        if one.op in _FREE or one.op.endswith(("-done", "-update")):
            return Cost()
        moved = _bytes_moved(self.program, place, one)
        if one.op == "custom-call":
            # Only the kernel knows which part of its operands it reads.
            moved = _kernel_estimate(one, "bytes_accessed") or moved
        return dataclasses.replace(self._work(place, one), bytes=moved)

    def _work(self, place: Computation, one: Instruction) -> Cost:
        """Count products and collectives, those inside a fusion included."""
        if "calls" in one.called:
            return self.fused(one.called["calls"][0])
        if one.op in ("dot", "convolution"):
            return Cost(_product_flops(place, one))
        if one.op == "custom-call":
            return Cost(_kernel_estimate(one, "flops"))
        if one.op == "reduce":
            return Cost(_summed_product_flops(place, one.operands[0]))
        kind = one.op.removesuffix("-start")
        if kind not in _COLLECTIVES or _continues_collective(one):
            return Cost()
        operands = (place.instructions.get(name) for name in one.operands)
        size = sum(o.all_bytes for o in operands if o)
        devices = _group_size(one.attributes, self.program.devices)
        return Cost(sent=_ring_bytes(kind, size, devices))

    def _fused(self, name: str) -> Cost:
        """Count products and collectives of a fusion's computation."""
        place = self.program.computations[name]
        parts = (self._work(place, i) for i in place.instructions.values())
        return functools.reduce(Cost.plus, parts, Cost())


def _product_flops(place: Computation, one: Instruction) -> float:
    """Count 2 x the multiplications of a ``dot`` or ``convolution``.

    A ragged product (``jax.lax.ragged_dot``) reads each row with the one
    matrix of its group, though the program spells it as a product with every
    one of them and a mask: its groups count once.
    """
    out = one.arrays[0].shape
    left, right = (
        place.instructions[name].arrays[0].shape for name in one.operands[:2]
    )
    if one.op == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        dims = [int(d) for d in match[1].split(",") if d] if match else []
        return 2.0 * math.prod(out) * math.prod(left[d] for d in dims)
    lhs, kernel, result = re.search(
        r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes
    ).groups()
    flops = 2.0 * right[kernel.index("i")]
    flops *= math.prod(out[result.index(label)] for label in "bf")
    for label in (k for k in kernel if k.isdigit()):
        # A dimension of a dot: a batch has the same size in all three, others
        # are 1 in one of them.
        flops *= max(
            left[lhs.index(label)],
            right[kernel.index(label)],
            out[result.index(label)],
        )
    if "ragged_dot" in one.attributes and len(right) > 2:
        flops /= max(right[kernel.index(k)] for k in kernel if k.isdigit())
    return flops


def _summed_product_flops(place: Computation, name: str) -> float:
    """Count 2 x the elements of what is summed, if it is a product."""
    source = place.instructions.get(name)
    if source is not None and source.op in ("convert", "bitcast", "copy"):
        return _summed_product_flops(place, source.operands[0])
    is_product = source is not None and source.op == "multiply"
    return 2.0 * source.arrays[0].size if is_product else 0.0


def _kernel_estimate(one: Instruction, what: str) -> float:
    """Return what a kernel says of its "flops", or "bytes_accessed"; else 0."""
    match = re.search(rf'"{what}":\s*"?(\d+(?:\.\d+)?)', one.attributes)
    return float(match[1]) if match else 0.0


def _ring_bytes(kind: str, size: float, devices: int) -> float:
    """Count what each of n devices sends on a ring.

    (n - 1) / n of the whole array for a gather, scatter and all-to-all, twice
    that for an all-reduce; ``size`` is that of the operands on one device.
    """
    if devices <= 1:
        return 0.0
    if kind == "all-gather":
        return size * (devices - 1)
    if kind == "collective-permute":
        return size
    factor = 2.0 if kind == "all-reduce" else 1.0
    return factor * size * (devices - 1) / devices


def _group_size(attributes: str, devices: int) -> int:
    """Read ``replica_groups`` in any of XLA's three spellings; {} means all."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    pattern = r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}"
    if named := re.search(pattern, attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # "'a':(2)4" is a part of an axis, of size 4.
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return devices


def _continues_collective(instruction: Instruction) -> bool:
    """Whether it names a collective again that another instruction started."""
    match = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
    return match is not None and match[1] != "-1"


def _bytes_moved(
    program: Program, place: Computation, one: Instruction
) -> float:
    """Count what an instruction outside fusions reads and writes."""
    if one.op == "custom-call" and not one.operands:
        return 0.0  # allocates a buffer
    sources = [place.instructions.get(name) for name in one.operands]
    if one.op == "fusion":
        fused = program.computations[one.called["calls"][0]]
        read = sum(
            min(source.bytes, _read(program, fused, fused.parameters[i].name))
            for i, source in enumerate(sources)
            # Else it is a literal, or lies in a faster memory.
            if source is not None and source.bytes
        )
        return read + min(one.bytes, _written(program, fused, fused.root))
    reads = [s.bytes if s is not None else 0.0 for s in sources]
    written = one.bytes
    if one.op in _SLICES:
        reads[0] = min(reads[0], one.all_bytes)
    elif one.op == "dynamic-update-slice":
        reads[0], written = 0.0, min(one.bytes, sources[1].all_bytes)
    elif one.op.endswith("-start"):  # its result repeats its operands
        written = max(one.bytes - sum(reads), 0.0)
    return sum(reads) + written


def _forwards(one: Instruction) -> bool:
    """Whether an instruction of a fusion hands its operands on."""
    return '"AsyncCollectiveDone"' in one.attributes or (
        _continues_collective(one)
    )


def _is_view(one: Instruction) -> bool:
    """Whether a fusion inside a fusion is its operand in another tiling.

    The compiler of TPU7x reads a slice of stacked weights this way.
    """
    return one.op == "bitcast" or (
        one.op == "fusion" and "{{}: (0, {})}" in one.attributes
    )


def _read(program: Program, fused: Computation, name: str) -> float:
    """Count what a fusion reads of a value; infinite for all of it."""
    if fused.instructions[name].root:
        return math.inf
    total = 0.0
    for user in fused.users[name]:
        first = user.operands[0] == name and name not in user.operands[1:]
        if user.op in _SLICES and first:
            total += user.all_bytes
        elif _is_view(user):
            total += _read(program, fused, user.name)
        elif user.op == "fusion" and not _forwards(user):
            inner = program.computations[user.called["calls"][0]]
            total += sum(
                _read(program, inner, inner.parameters[i].name)
                for i, operand in enumerate(user.operands)
                if operand == name
            )
        elif not (
            user.op == "tuple"
            or _forwards(user)
            or (user.op == "dynamic-update-slice" and first)  # in place
        ):
            return math.inf
    return total


def _written(program: Program, fused: Computation, one: Instruction) -> float:
    """Count what a fusion writes as (a part of) its result."""
    sources = [fused.instructions.get(name) for name in one.operands]
    if one.op == "tuple":
        return sum(_written(program, fused, s) for s in sources)
    if one.op == "dynamic-update-slice":
        return sources[1].all_bytes
    if one.op == "parameter" or _forwards(one):
        return 0.0
    if one.op == "bitcast" and sources[0].op != "parameter":
        return _written(program, fused, sources[0])
    if one.op == "fusion":
        inner = program.computations[one.called["calls"][0]]
        return _written(program, inner, inner.root)
    return one.all_bytes
