"""Memory and peaks of a TPU chip of each kind, from public documentation.

Google Cloud, "TPU architecture" pages of each version
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x): memory, bfloat16
peak, memory bandwidth, and the bidirectional bandwidth of the links between
chips, of which one direction (half) is taken. No program reaches these peaks:
times computed from them are lower bounds.

What such programs reach in practice is published too. Training of dense models
in bfloat16: MaxText's performance tables (22B on v4-128 0.567, 16B on v5e-256
0.61, 32B on v5p-128 0.71 of the peak; 2B to 8B on v6e and TPU7x 0.39 to 0.47,
the middle is taken). Decoding: tpu-inference's published runs, Qwen3-8B on four
chips of v6e with 64 rows, 5,297 tokens a second, 0.4 of the bandwidth. For
links nothing is published: they are taken as bandwidth.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Hold the figures of one device as JAX sees it: a chip, or a core of it.

    Attributes:
      name: as in a topology, "v5e".
      kind: of ``device_kind``.
      memory: bytes of HBM.
      flops: bfloat16 operations a second.
      bandwidth: HBM bytes a second.
      link: bytes a second to other chips, in one direction, over all links.
      trained: share of ``flops`` that training is published to reach.
      part: of a chip; a core that is a device of its own is half of one.
    """

    name: str
    kind: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    trained: float
    part: float = 1.0


_GIB = 2.0**30
# Share of the bandwidth that decoding is published to reach.
DECODED = 0.4

CHIPS = (
    Chip("v4", "TPU v4", 32 * _GIB, 275e12, 1200e9, 300e9, 0.567),
    Chip("v5e", "TPU v5 lite", 16 * _GIB, 197e12, 819e9, 200e9, 0.61),
    Chip("v5p", "TPU v5", 95 * _GIB, 459e12, 2765e9, 600e9, 0.71),
    Chip("v6e", "TPU v6 lite", 32 * _GIB, 918e12, 1638e9, 400e9, 0.43),
    Chip("TPU7x", "TPU7x", 192 * _GIB, 2307e12, 7380e9, 600e9, 0.43),
)

# libtpu asks for the machine it is on, and complains if that is none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def chip_of(devices: Sequence[jax.Device]) -> Chip:
    """Return the figures of one device.

    A core that is a device of its own (TPU7x) has its part of the chip.

    Args:
      devices: of one topology.

    Raises:
      ValueError: for a kind that is not in the table.
    """
    kind = devices[0].device_kind
    for chip in CHIPS:
        if chip.kind == kind:
            cores = len(devices) / len({tuple(d.coords) for d in devices})
            figures = ("memory", "flops", "bandwidth", "link")
            part = {name: getattr(chip, name) / cores for name in figures}
            return dataclasses.replace(chip, part=1 / cores, **part)
    raise ValueError(
        f"no figures for a {kind!r}; known: "
        f"{', '.join(chip.name for chip in CHIPS)}"
    )


def without_tpu() -> None:
    """Let the TPU compiler run on a machine without a TPU."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    # What is compiled for no device cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Return the devices of a TPU topology, which need not be at hand.

    Args:
      name: kind and shape, "v5e:2x4".

    Raises:
      ValueError: if libtpu is missing or does not know the name.
    """
    from jax.experimental import topologies

    told = dict(topology_name=name, platform="tpu")
    try:
        devices = topologies.get_topology_desc(**told).devices
        # On a Cloud TPU the two cores of a v4 are one device; libtpu says two.
        if devices[0].device_kind == "TPU v4":
            told["chip_config_name"] = "megacore"
            devices = topologies.get_topology_desc(**told).devices
        return devices
    except Exception as error:  # the plugin's own types
        raise ValueError(
            f"--topology {name}: {' '.join(str(error).split())[:300]}; try "
            "v5e:2x4, and pip install 'topd_jax[tpu]' where libtpu is missing"
        ) from error
