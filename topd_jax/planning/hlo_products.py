"""Floating-point operations of the products in a compiled program. Ours."""

import functools
import math
import re

from topd_jax.planning.hlo import Computation, Instruction


def product_flops(place: Computation, one: Instruction) -> float:
    """2 x the multiplications of a ``dot`` or ``convolution``.

    A ragged product (``jax.lax.ragged_dot``) reads each row with the one
    matrix of its group, though the program spells it as a product with every
    one of them and a mask: its groups count once.

    Args:
      place: computation it is in, for the shapes of its operands.
      one: the instruction.

    Returns:
      Floating-point operations.
    """
    out = one.arrays[0].shape
    left, right = (
        place.instructions[name].arrays[0].shape for name in one.operands[:2]
    )
    if one.op == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        dims = [int(d) for d in found[1].split(",") if d] if found else []
        return 2.0 * math.prod(out) * math.prod(left[d] for d in dims)
    lhs, kernel, result = re.search(
        r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes
    ).groups()
    features = right[kernel.index("i")]
    total = (
        2.0
        * features
        * math.prod(out[i] for i, label in enumerate(result) if label in "bf")
    )
    for label in (k for k in kernel if k.isdigit()):
        # A batch of products is a convolution whose window meets one element.
        total *= _meetings(
            left[lhs.index(label)],
            right[kernel.index(label)],
            out[result.index(label)],
            _window(one.attributes, int(label)),
        )
    if "ragged_dot" in one.attributes and len(right) > 2:
        total /= max(right[kernel.index(k)] for k in kernel if k.isdigit())
    return total


def summed_products(place: Computation, one: Instruction) -> float:
    """2 x the elements of a product that is summed at once, else 0.

    So XLA writes a product with a single row, the one of decoding a row.
    """
    source = place.instructions.get(one.operands[0])
    while source is not None and source.op in ("convert", "bitcast", "copy"):
        source = place.instructions.get(source.operands[0])
    if source is None or source.op != "multiply":
        return 0.0
    return 2.0 * source.arrays[0].size


def _window(attributes: str, dim: int) -> dict[str, int]:
    """Stride, padding and dilations of one spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(p.split("=") for p in found[1].split()) if found else {}

    def at(name: str, default: str) -> str:
        return given[name].split("x")[dim] if name in given else default

    return {
        "stride": int(at("stride", "1")),
        "low": int(at("pad", "0_0").split("_")[0]),
        "lhs": int(at("lhs_dilate", "1")),
        "rhs": int(at("rhs_dilate", "1")),
    }


@functools.cache
def _pairs(
    left: int, right: int, out: int, stride: int, low: int, lhs: int, rhs: int
) -> int:
    total = 0
    for k in range(right):
        for o in range(out):
            at = o * stride + k * rhs - low
            total += at >= 0 and at % lhs == 0 and at // lhs < left
    return total


def _meetings(left: int, right: int, out: int, window: dict[str, int]) -> int:
    """Pairs (kernel element, output element) that meet an input element."""
    return _pairs(left, right, out, **window)


def kernel_says(one: Instruction, what: str) -> float:
    """What a custom call's kernel says that it costs; 0 where it is silent.

    Args:
      one: the call.
      what: "flops", or "bytes_accessed" of main memory, where blocks that are
        read again count again.
    """
    found = re.search(rf'"{what}":\s*"?(\d+(?:\.\d+)?)', one.attributes)
    return float(found[1]) if found else 0.0
