"""Experts that a file holds as one tensor, shown as one tensor an expert.

Hub files of mixtures hold each expert's three maps apart; what transformers 5
keeps in memory, and some files therefore hold, is ``experts.gate_up_proj``
[E, 2 F, D] and ``experts.down_proj`` [E, D, F]. Both are read; the first is
written, since every version of transformers reads it.
"""

import re
from collections.abc import Mapping

import numpy as np

from topd_jax.models.io.streaming import Read
from topd_jax.models.io.weights import TensorInfo

_STACKED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")


def split_experts(
    found: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], Read]:
    """Shows every stacked tensor as those of its experts.

    Args:
      found: name -> shape and type of all tensors.
      read: (name, slices) -> array.

    Returns:
      The same two, in the spelling of one tensor an expert.
    """
    shown: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, int, slice]] = {}
    for name, info in found.items():
        stacked = _STACKED.fullmatch(name)
        if not stacked or len(info.shape) != 3:
            shown[name] = info
            continue
        count, rows, columns = info.shape
        cuts = {"down_proj": slice(0, rows)}
        if stacked[2] == "gate_up_proj":
            cuts = {
                "gate_proj": slice(0, rows // 2),
                "up_proj": slice(rows // 2, rows),
            }
        for expert in range(count):
            for part, cut in cuts.items():
                own = f"{stacked[1]}{expert}.{part}.weight"
                shape = (cut.stop - cut.start, columns)
                shown[own] = TensorInfo(shape, info.dtype)
                parts[own] = name, expert, cut

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in parts:
            return read(name, index)
        whole, expert, cut = parts[name]
        rows, *columns = index
        own = slice(cut.start + rows.start, cut.start + rows.stop)
        return read(whole, (slice(expert, expert + 1), own, *columns))[0]

    return shown, read_part
