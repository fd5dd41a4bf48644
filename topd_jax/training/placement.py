"""The mesh of a run: as ``config.mesh`` says, or chosen where it is silent.

A mesh must use every device, and rows, heads and columns must divide over it.
Of those that are left, the first is taken that keeps models and optimizer in
half of a device's memory, in an order that follows from what decoding reads and
sends (``rollout.sharding``): a parameter that is gathered at every token costs
most, so rows and heads are spread before fsdp; where fsdp is a second tensor
axis, a token reads the less the larger it is.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from topd_jax.data.routing import check_rows
from topd_jax.parallel import sharding
from topd_jax.parallel.settings import MeshSettings
from topd_jax.training.config import Settings
from topd_jax.training.shapes import (
    abstract_models,
    bytes_held,
    model_configs,
)

# Share of a device for models and optimizer: gradients, caches and activations
# need the rest.
_KEPT = 0.5
# rollout.sharding -> order of (fsdp, tensor).
_ORDER: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "train": lambda fsdp, tensor: (fsdp, tensor),
    "gathered": lambda fsdp, tensor: (tensor, fsdp),
    "tensor": lambda fsdp, tensor: (tensor, -fsdp),
    "rows": lambda fsdp, tensor: (tensor, -fsdp),
}


def make_run_mesh(
    settings: Settings,
    devices: Sequence[jax.Device] | None = None,
    memory: float | None = None,
) -> Mesh:
    """Build the mesh of a run, chosen if every axis is left at its default.

    Args:
      settings: of the run.
      devices: None takes all of ``jax.devices()``.
      memory: bytes of one of them; None asks it.

    Returns:
      The mesh.

    Raises:
      ValueError: where the axes do not multiply to the number of devices, or
        none of the meshes that do divides the batch and the models; with a
        batch that would.
    """
    devices = list(jax.devices() if devices is None else devices)
    if settings.mesh != MeshSettings() or len(devices) == 1:
        axes = dataclasses.asdict(settings.mesh)
        return sharding.make_mesh(**axes, devices=devices)
    model_configs(settings)  # raises for models that are not known
    kept = {}
    for fsdp, tensor in _candidates(settings, len(devices)):
        mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor, devices=devices)
        try:
            models = abstract_models(settings, mesh)
        except ValueError:  # heads or columns do not divide
            continue
        size = bytes_held((models.state, models.teachers, models.frozen))
        memory = device_bytes(mesh) if memory is None else memory
        if memory is None or size <= _KEPT * memory:
            return mesh
        kept[size] = mesh
    if not kept:
        raise ValueError(_refusal(settings, devices))
    return kept[min(kept)]


def check_batches(settings: Settings, mesh: Mesh) -> None:
    """Refuse batch sizes that do not divide over the mesh.

    Args:
      settings: of the run.
      mesh: of devices.

    Raises:
      ValueError: naming a size that does.
    """
    for name, size in _batches(settings).items():
        check_rows(size, mesh, name)


def _batches(settings: Settings) -> dict[str, int]:
    """Return the settings that are numbers of rows on the mesh."""
    return {
        "data.batch_size": settings.data.batch_size,
        "eval.batch_size": settings.eval.batch_size,
        "rollout.slots": settings.rollout.slots,
    }


def device_bytes(mesh: Mesh) -> float | None:
    """Return the bytes of one device, None where it does not tell them.

    A CPU has its share of the machine's.
    """
    index = jax.process_index()
    device = next(d for d in mesh.devices.flat if d.process_index == index)
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _candidates(settings: Settings, devices: int) -> list[tuple[int, int]]:
    """Return (fsdp, tensor) over which rows divide, the best first."""
    sizes = _batches(settings).values()
    found = [
        (fsdp, tensor)
        for tensor in _divisors(devices)
        if not any(size % (devices // tensor) for size in sizes)
        for fsdp in _divisors(devices // tensor)
    ]
    order = _ORDER[settings.rollout.sharding]
    rows = settings.data.batch_size * settings.data.samples
    part = rows // settings.optimizer.accumulate  # of an update, at a time
    return sorted(
        found,
        key=lambda pair: (part % (devices // pair[1]) > 0, *order(*pair)),
    )


def _refusal(settings: Settings, devices: Sequence[jax.Device]) -> str:
    """Say which batch would use all devices."""
    tensor = 1
    for size in _divisors(len(devices))[1:]:
        try:
            mesh = sharding.make_mesh(tensor=size, devices=devices)
            abstract_models(settings, mesh)
        except ValueError:
            continue
        tensor = size
    ways = len(devices) // tensor
    sizes = _batches(settings)
    told = ", ".join(f"{name}={size}" for name, size in sizes.items() if size)
    flags = " ".join(
        f"--config.{name}={-(-size // ways) * ways}"
        for name, size in sizes.items()
        if size % ways
    )
    return (
        f"no mesh uses all {len(devices)} devices: the models divide among at "
        f"most mesh.tensor={tensor}, so prompts must divide among {ways}, and "
        f"{told}; try {flags}, or fewer devices"
    )
