"""Reads the text of a compiled program: its computations and instructions.

XLA prints an optimised program (``jax.stages.Compiled.as_text``) as named
computations, each a list of instructions in order. Only what costs are counted
from is kept: names, operation, operands, shapes with their memory space, and
the attributes as text. Ours.
"""

import dataclasses
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*-> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

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
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes, without what a tiled layout pads."""
        return self.size * bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      op: "fusion", "while", ...
      operands: names of the instructions it reads; of a constant or a
        parameter, what stands in the brackets.
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

    def called(self, kind: str) -> tuple[str, ...]:
        """Names of the computations it calls as ``kind``, "body" say."""
        for found in _CALLED.finditer(self.attributes):
            if found[1] == kind:
                names = (found[2] or found[3]).split(",")
                return tuple(n.strip().lstrip("%") for n in names)
        return ()

    @property
    def bytes(self) -> float:
        """Bytes of the result in main memory."""
        return sum(a.bytes for a in self.arrays if a.space == 0)


@dataclasses.dataclass
class Computation:
    """A named list of instructions.

    Attributes:
      name: of the computation.
      instructions: name -> instruction, in order.
    """

    name: str
    instructions: dict[str, Instruction]

    def __post_init__(self) -> None:
        self._users: dict[str, list[Instruction]] | None = None

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, index: int) -> Instruction | None:
        """The parameter of that number."""
        for one in self.instructions.values():
            if one.op == "parameter" and one.operands == (str(index),):
                return one
        return None

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read ``name``."""
        if self._users is None:
            self._users = {}
            for one in self.instructions.values():
                for operand in set(one.operands):
                    self._users.setdefault(operand, []).append(one)
        return self._users.get(name, [])


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: name -> computation.
      entry: name of the first one.
      devices: that it is partitioned over.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def bits(dtype: str) -> int:
    """Bits of an element of XLA's type of that name; 0 for a token."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred" or dtype.startswith("f8"):
        return 8
    return int(re.search(r"\d+", dtype)[0])


def parse(text: str) -> Program:
    """Reads a program.

    Args:
      text: what ``Compiled.as_text()`` gives.

    Returns:
      The program.

    Raises:
      ValueError: for a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = Computation(header[2], {})
            computations[current.name] = current
            entry = current.name if header[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            one = _instruction(found[2], found[3], bool(found[1]))
            current.instructions[one.name] = one
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("the text has no ENTRY computation: not an HLO module")
    # In the first line, which names every argument and may be long.
    head = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(head[1]) if head else 1)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    operands = tuple(_operand(o) for o in _split(rest[start + 1 : close]))
    return Instruction(
        name, rest[:start], operands, _arrays(kind), rest[close + 1 :], root
    )


def _arrays(text: str) -> tuple[Array, ...]:
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        space = _SPACE.search(layout)
        out.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(out)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]}")


def _split(text: str) -> list[str]:
    """At the commas that no bracket encloses."""
    out, depth, last = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            out.append(text[last:place])
            last = place + 1
    return [p for p in (*out, text[last:]) if p.strip()]


def _operand(text: str) -> str:
    # "/*index=5*/%name", or with its type before the name.
    return text.strip().split(" ")[-1].split("*/")[-1].lstrip("%")
