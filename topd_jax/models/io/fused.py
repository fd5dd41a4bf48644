"""Tensors of files that hold several parameters: read in parts, put together.

Some families keep q, k and v, or gate and up, in one tensor, and some files all
experts of a layer: :class:`~topd_jax.models.io.families.Fused` says what is
where.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from topd_jax.models.io.families import Fused
from topd_jax.models.io.streaming import Read, Rows
from topd_jax.models.io.tensors import LAYER

_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
# Hub files hold the maps of each expert apart; what transformers 5 keeps in
# memory, and some files therefore hold, is gate_up_proj [E, 2 F, D] and
# down_proj [E, D, F]. GGUF files stack each map.
_STACKED = tuple(
    Fused(
        f"mlp.experts.{maps}_proj{end}",
        tuple(f"expert_{name}" for name in maps.split("_")),
        experts=True,
    )
    for maps in ("gate_up", "gate", "up", "down")
    for end in ("", ".weight")
)


class TensorInfo(NamedTuple):
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class Part(NamedTuple):
    """Where in a file's tensor the tensor of one parameter is.

    Attributes:
      tensor: of the file.
      expert: its index there; None where that tensor counts none.
      start: first row.
      step: from row to row.
      turned: the tensor is [in, out].
    """

    tensor: str
    expert: int | None
    start: int
    step: int
    turned: bool


class Whole(NamedTuple):
    """A tensor to write.

    Attributes:
      shape: of it.
      parts: names of the tensors that it holds, those of its first parameter
        first.
      fused: how; None where it is its only part.
    """

    shape: tuple[int, ...]
    parts: Sequence[str]
    fused: Fused | None


def split_fused(
    tensors: Mapping[str, TensorInfo],
    read: Read,
    rows: Rows,
    fused: Sequence[Fused],
) -> tuple[dict[str, TensorInfo], Read]:
    """Show tensors that hold several parameters as one tensor each.

    Args:
      tensors: of the file.
      read: (name, slices) -> that part of it.
      rows: the tensors of the decoder, each parameter of a layer apart.
      fused: of the family.

    Returns:
      (tensors, read) that know the parts alone.
    """
    specs = {spec.hub: spec for spec in (*_STACKED, *fused)}
    names = {(name, index): tensor for tensor, (name, index, _) in rows.items()}
    shown: dict[str, TensorInfo] = {}
    parts: dict[str, Part] = {}
    for tensor, info in tensors.items():
        match = _OF_LAYER.fullmatch(tensor)
        spec = specs.get(match[2]) if match and tensor not in rows else None
        dims = () if spec is None else info.shape[spec.experts :]
        if not 1 <= len(dims) <= 2:
            shown[tensor] = info
            continue
        turned = spec.turned and len(dims) == 2
        size, *inner = dims[::-1] if turned else dims
        for expert in range(info.shape[0]) if spec.experts else (None,):
            index = (int(match[1]),) + (() if expert is None else (expert,))
            wanted = [names.get((name, index)) for name in spec.parameters]
            sizes = [rows[n][2][0] if n in rows else size for n in wanted]
            if sum(sizes) != size or spec.interleaved:
                sizes = [size // len(wanted)] * len(wanted)
            for i, name in enumerate(wanted):
                # What the decoder has not is shown, and refused, by its place.
                name = name or f"{tensor}[{expert}, {spec.parameters[i]}]"
                shown[name] = TensorInfo((sizes[i], *inner), info.dtype)
                start, step = sum(sizes[:i]), 1
                if spec.interleaved:
                    start, step = i, len(wanted)
                parts[name] = Part(tensor, expert, start, step, turned)

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in parts:
            return read(name, index)
        tensor, expert, start, step, turned = parts[name]
        span, *others = index
        first = start + span.start * step
        last = start + (span.stop - 1) * step
        moved = [slice(first, last + 1), *others]
        if turned:
            moved.reverse()
        if expert is None:
            array = read(tensor, tuple(moved))
        else:
            array = read(tensor, (slice(expert, expert + 1), *moved))[0]
        return (array.T if turned else array)[::step]

    return shown, read_part


def whole_tensors(rows: Rows, fused: Sequence[Fused]) -> dict[str, Whole]:
    """List the tensors that a file holds.

    Args:
      rows: the tensors of the decoder, each parameter of a layer apart.
      fused: of the family.

    Returns:
      name -> what it is made of, by :func:`join`.
    """
    specs = {name: spec for spec in fused for name in spec.parameters}
    parts: dict[str, list[str]] = {}
    for tensor, (name, index, _) in rows.items():
        if spec := specs.get(name):
            whole = LAYER.format(index[0]) + spec.hub
            parts.setdefault(whole, []).append(tensor)
        else:
            parts[tensor] = [tensor]
    wholes = {}
    for whole, own in parts.items():
        spec, shapes = specs.get(rows[own[0]][0]), [rows[n][2] for n in own]
        shape = shapes[0]
        if spec is not None:
            each = len(own) // len(spec.parameters)
            shape = sum(s[0] for s in shapes[::each]), *shape[1:]
            shape = shape[::-1] if spec.turned else shape
            shape = (each, *shape) if spec.experts else shape
        wholes[whole] = Whole(shape, own, spec)
    return wholes


def join(arrays: Sequence[np.ndarray], fused: Fused | None) -> np.ndarray:
    """Put parts together, the inverse of :func:`split_fused`.

    Args:
      arrays: in the order of :class:`Whole`.
      fused: how.

    Returns:
      The tensor, contiguous.
    """
    if fused is None:
        return arrays[0]
    each = len(arrays) // len(fused.parameters)
    wholes = []
    for i in range(each):
        parts = arrays[i::each]
        whole = np.concatenate(parts)
        if fused.interleaved:
            whole = np.stack(parts, axis=1).reshape(whole.shape)
        wholes.append(whole.T if fused.turned else whole)
    whole = np.stack(wholes) if fused.experts else wholes[0]
    return np.ascontiguousarray(whole)
