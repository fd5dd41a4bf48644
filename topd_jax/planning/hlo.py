"""The text of a compiled program as computations and instructions.

XLA prints an optimized program (``jax.stages.Compiled.as_text``) as named
computations, each a list of instructions in order. Only the fields that costs
are counted from are kept.
"""

import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:.*-> .*)?\{$")
# Name, type, operation, operands, attributes; a tuple's type is in brackets.
_LINE = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """Hold one array of an instruction's result.

    Attributes:
      dtype: XLA's name, "bf16".
      shape: sizes.
      space: memory space; 0 is a device's main memory (HBM on a TPU).
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Return the bytes, without the padding of a tiled layout."""
        return self.size * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Hold one instruction.

    Attributes:
      name: unique in its computation.
      op: "fusion", "while", ...
      operands: names of the instructions it reads; for a constant or a
        parameter, the text in the brackets.
      arrays: of the result, flat.
      attributes: the rest of the line.
      root: whether it is the result of its computation.
    """

    name: str
    op: str
    operands: tuple[str, ...]
    arrays: tuple[Array, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Return "body", "calls", ... -> names of the computations called."""
        return {
            kind: tuple(n.strip().lstrip("%") for n in (many or one).split(","))
            for kind, many, one in _CALLED.findall(self.attributes)
        }

    @property
    def bytes(self) -> float:
        """Return the bytes of the result that lie in main memory."""
        return sum(a.bytes for a in self.arrays if a.space == 0)

    @property
    def all_bytes(self) -> float:
        """Return the bytes of the result, whatever memory it lies in."""
        return sum(a.bytes for a in self.arrays)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Hold a named list of instructions.

    Attributes:
      instructions: name -> instruction, in order.
    """

    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Return the instruction that is the result."""
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Return number -> parameter."""
        return {
            int(i.operands[0]): i
            for i in self.instructions.values()
            if i.op == "parameter"
        }

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Return name -> the instructions that read it."""
        users: dict[str, list[Instruction]] = {n: [] for n in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands) & users.keys():
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """Hold a compiled program.

    Attributes:
      computations: name -> computation.
      entry: name of the computation that runs first.
      devices: that the program is partitioned over.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Program:
    """Parse the text of a program.

    Args:
      text: of ``Compiled.as_text()``.

    Returns:
      The program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computations[header[2]] = current = Computation({})
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            root, name, kind, op, operands, attributes = match.groups()
            current.instructions[name] = Instruction(
                name, op, _names(operands), _arrays(kind), attributes,
                bool(root),
            )  # fmt: skip
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _bits(dtype: str) -> int:
    """Return the bits of an element, "f8e4m3" included; 0 for a token."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0


def _names(text: str) -> tuple[str, ...]:
    # "%a.1, /*index=5*/%b"
    names = (part.split("*/")[-1].strip() for part in text.split(","))
    return tuple(name.lstrip("%") for name in names if name)


def _arrays(text: str) -> tuple[Array, ...]:
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        space = _SPACE.search(layout)
        out.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(out)
