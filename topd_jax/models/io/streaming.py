"""A parameter from a file's tensors to its devices, piece by piece.

A process reads what its own devices hold, every number once, however many
devices hold it. The host keeps the parameter that is being read, and of the
file one small piece.
"""

import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from topd_jax.models.io.tensors import file_dims, file_shape

# (name in the file, one slice a dimension of it) -> floats.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]
# Name in the file -> (parameter, index into it, shape in the file); the index
# is (), (row of its layer,) or (row, expert).
Rows = Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]

# Turned and cast at once: small beside a stack, large beside a call.
_PIECE_BYTES = 1 << 20


def stream(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    rows: Rows,
    read: Read,
    sharding: NamedSharding | None,
) -> jax.Array:
    """Read one parameter and place it.

    Args:
      name: of the parameter.
      shape: of the whole parameter.
      dtype: in which it is kept.
      rows: of the file, also those of other parameters.
      read: reads a part of a tensor, linear maps as [out, in].
      sharding: of the parameter; None is one device.

    Returns:
      The parameter.
    """
    tensors = [(t, index) for t, (n, index, _) in rows.items() if n == name]
    stacked = len(tensors[0][1])

    @functools.cache  # several devices may hold the same part
    def part(*spans: range) -> np.ndarray:
        layers, wanted = spans[:stacked], spans[stacked:]
        cover, box = _cover(name, shape[stacked:], wanted)
        host = np.empty([*map(len, layers), *map(len, cover)], dtype)
        for tensor, index in tensors:
            if all(i in s for i, s in zip(index, layers, strict=True)):
                at = [s.index(i) for i, s in zip(index, layers, strict=True)]
                _fill(_as_in_file(name, host[*at]), tensor, box, read)
        inside = (
            slice(s.start - c.start, s.stop - c.start)
            for s, c in zip(wanted, cover, strict=True)
        )
        return host[..., *inside]

    if sharding is None:  # without a device it stays free to follow others
        array = jax.device_put(part(*map(range, shape)))
    else:
        array = jax.make_array_from_callback(
            shape,
            sharding,
            lambda index: part(*map(_ranged, shape, index)),
        )
    jax.block_until_ready(array)
    part.cache_clear()
    # JAX lets go of what it has copied when Python collects garbage.
    gc.collect(0)
    return array


def _ranged(size: int, index: slice) -> range:
    return range(size)[index]


def _cover(
    name: str, shape: tuple[int, ...], spans: Sequence[range]
) -> tuple[list[range], list[range]]:
    """Widen a part of a layer until each dimension of the file has one range.

    Returns:
      (ranges of the layer, ranges of the file's tensor).
    """
    cover, box = list(spans), []
    for first, *rest in file_dims(name, len(shape)):
        for d in rest:
            cover[d] = range(shape[d])
        inner = math.prod(shape[d] for d in rest)
        box.append(range(cover[first].start * inner, cover[first].stop * inner))
    return cover, box


def _as_in_file(name: str, part: np.ndarray) -> np.ndarray:
    """View a layer's part with the dimensions of the file."""
    shape = file_shape(name, part.shape)
    first, *others = file_dims(name, part.ndim)
    if others and first[0] > others[0][0]:  # the file holds it turned
        return part.reshape(shape[::-1]).T
    return part.reshape(shape)


def _fill(
    target: np.ndarray,
    tensor: str,
    box: Sequence[range],
    read: Read,
) -> None:
    rows, *others = box
    row_bytes = 4 * math.prod(map(len, others))
    step = max(1, _PIECE_BYTES // row_bytes)
    for i in range(0, len(rows), step):
        parts = (rows[i : i + step], *others)
        piece = read(tensor, tuple(slice(p.start, p.stop) for p in parts))
        target[i : i + step] = piece
