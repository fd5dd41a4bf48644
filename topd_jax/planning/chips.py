"""What a TPU chip of each kind holds and does, from public documentation.

Google Cloud, "TPU architecture" pages of each version
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x): memory, bfloat16
peak, memory bandwidth, and the bidirectional bandwidth of the links between
chips, of which one direction (half) is taken. Those are peaks, which no
program reaches: times made of them are lower bounds.
"""

import dataclasses
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: a chip, or one of its cores.

    Attributes:
      name: as in a topology, "v5e".
      kind: what ``device_kind`` says.
      memory: bytes of HBM.
      flops: bfloat16 floating-point operations a second.
      bandwidth: HBM bytes a second.
      link: bytes a second to other chips, in one direction, over all links.
    """

    name: str
    kind: str
    memory: float
    flops: float
    bandwidth: float
    link: float


_GIB = 2.0**30

CHIPS = (
    Chip("v4", "TPU v4", 32 * _GIB, 275e12, 1200e9, 300e9),
    Chip("v5e", "TPU v5 lite", 16 * _GIB, 197e12, 819e9, 200e9),
    Chip("v5p", "TPU v5", 95 * _GIB, 459e12, 2765e9, 600e9),
    Chip("v6e", "TPU v6 lite", 32 * _GIB, 918e12, 1638e9, 400e9),
    Chip("TPU7x", "TPU7x", 192 * _GIB, 2307e12, 7380e9, 600e9),
)


def chip_of(devices: Sequence[jax.Device]) -> Chip:
    """The part of a chip that each of these devices is.

    Where a chip's cores are devices of their own (v4 as compiled for here,
    TPU7x) each has its share of the chip.

    Args:
      devices: of one topology.

    Returns:
      The figures of one device.

    Raises:
      ValueError: for a kind that is not in the table.
    """
    kind = devices[0].device_kind
    for chip in CHIPS:
        if chip.kind == kind:
            cores = len(devices) / len({tuple(d.coords) for d in devices})
            return dataclasses.replace(
                chip,
                memory=chip.memory / cores,
                flops=chip.flops / cores,
                bandwidth=chip.bandwidth / cores,
                link=chip.link / cores,
            )
    raise ValueError(
        f"no figures for a {kind!r}; known: "
        f"{', '.join(chip.name for chip in CHIPS)}"
    )


def fits_one_host(devices: Sequence[jax.Device]) -> bool:
    """Whether a machine with all of these chips exists.

    Eight of v5e and v6e (ct5lp-hightpu-8t, ct6e-standard-8t), four of others;
    a topology divides eight among two hosts, which exist too.

    Args:
      devices: of one topology.
    """
    most = 8 if devices[0].device_kind.endswith("lite") else 4
    return len({tuple(d.coords) for d in devices}) <= most
