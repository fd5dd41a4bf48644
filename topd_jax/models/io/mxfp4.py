"""MXFP4 tensors of gpt-oss files, expanded while they are read.

32 inputs of an output share a power of two, 2 ** (scale - 127), and each is a
number of 4 bits (E2M1), two a byte, the first in the low bits (OCP
Microscaling Formats 1.0). The tensor X of files in floats is X_blocks
u8[E, out, in / 32, 16] and X_scales u8[E, out, in / 32] here.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.streaming import Read

_SHARED = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
# The number of each four bits.
_NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
_NUMBERS = _NUMBERS.astype(np.float32)


def expand_mxfp4(
    tensors: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], Read]:
    """Show blocks and their scales as the tensor [E, in, out] that they are.

    Args:
      tensors: of the file.
      read: (name, slices) -> that part of it.

    Returns:
      (tensors, read) that know the expanded ones, float32, instead.
    """
    packed, shown = set(), dict(tensors)
    for name in tensors:
        stem = name.removesuffix(_BLOCKS)
        shapes = [tensors[s].shape for s in (name, stem + _SCALES)
                  if s in tensors]  # fmt: skip
        if stem == name or len(shapes) < 2 or shapes[0] != (*shapes[1], 16):
            continue
        experts, rows, groups = shapes[1]
        del shown[name], shown[stem + _SCALES]
        shown[stem] = TensorInfo((experts, groups * _SHARED, rows), "float32")
        packed.add(stem)

    def read_floats(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in packed:
            return read(name, index)
        expert, inputs, outputs = index
        first = inputs.start // _SHARED
        groups = slice(first, -(-inputs.stop // _SHARED))
        bits = read(name + _BLOCKS, (expert, outputs, groups, slice(0, 16)))
        scales = read(name + _SCALES, (expert, outputs, groups))
        numbers = _NUMBERS[np.stack([bits & 15, bits >> 4], axis=-1)]
        powers = scales.astype(np.int32)[..., None, None] - 127
        floats = np.ldexp(numbers, powers).reshape(*scales.shape[:2], -1)
        start = inputs.start - first * _SHARED
        floats = floats[..., start : start + inputs.stop - inputs.start]
        return np.swapaxes(floats, 1, 2)

    return shown, read_floats
