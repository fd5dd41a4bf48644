"""A parameter from a file's tensors to its devices, piece by piece.

A process reads what its own devices hold, every number once, however many
devices hold it. The host keeps the parameter that is being read, and of the
file one small piece.
"""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from tqdm import tqdm

from topd_jax.models.io.families import file_dims, file_shape
from topd_jax.parallel import hosts

# (name in the file, one slice a dimension of it) -> floats.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]
# Is told of every piece's bytes.
Advance = Callable[[int], object]
# What becomes of a parameter once it is placed, by name.
Finish = Callable[[str, jax.Array], object]

# Turned and cast at once: small beside a stack, large beside a call.
_PIECE_BYTES = 1 << 20
# Models below this are read before a bar could be looked at.
_SHOWN_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a parameter that one or several local devices hold.

    Attributes:
      spans: one range a dimension.
      devices: that hold it; empty where no mesh says.
    """

    spans: tuple[range, ...]
    devices: tuple[jax.Device, ...]


def local_blocks(
    shape: tuple[int, ...], sharding: NamedSharding | None
) -> list[Block]:
    """Return what this process's devices hold of an array, each part once.

    Args:
      shape: of the whole array.
      sharding: of the array; None is one device.

    Returns:
      The blocks.
    """
    if sharding is None:
        return [Block(tuple(range(n) for n in shape), ())]
    owners: dict[tuple[range, ...], list[jax.Device]] = {}
    places = sharding.addressable_devices_indices_map(shape)
    for device, index in places.items():
        spans = tuple(
            range(n)[part] for n, part in zip(shape, index, strict=True)
        )
        owners.setdefault(spans, []).append(device)
    return [Block(spans, tuple(held)) for spans, held in owners.items()]


def block_bytes(blocks: Sequence[Block], dtype: str) -> int:
    """Count the bytes of some blocks, each once."""
    numbers = sum(math.prod(map(len, block.spans)) for block in blocks)
    return numbers * jnp.dtype(dtype).itemsize


def stream(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    read: Read,
    sharding: NamedSharding | None,
    advance: Advance,
) -> jax.Array:
    """Read one parameter and place it.

    Args:
      name: of the parameter.
      shape: of the whole parameter.
      dtype: in which it is kept.
      tensors: (name in the file, index of it in the parameter): (), (row,) or
        (row, expert).
      read: reads a part of a tensor, linear maps as [out, in].
      sharding: of the parameter; None is one device.
      advance: is told of every piece's bytes.

    Returns:
      The parameter.
    """
    blocks = local_blocks(shape, sharding)
    stacked = len(tensors[0][1])
    covers = [_cover(name, shape, stacked, block.spans) for block in blocks]
    hosts = [np.empty([len(s) for s in cover], dtype) for cover in covers]
    # Tensors outside: what one holds for several devices lies close together.
    for tensor, index in tensors:
        for cover, host in zip(covers, hosts, strict=True):
            spans = cover[:stacked]
            if any(i not in s for i, s in zip(index, spans, strict=True)):
                continue
            at = tuple(s.index(i) for i, s in zip(index, spans, strict=True))
            box = _box(name, shape[stacked:], cover[stacked:])
            _fill(_as_in_file(name, host[at]), tensor, box, read, advance)
    placed = []
    for block, cover in zip(reversed(blocks), reversed(covers), strict=True):
        inside = tuple(
            slice(s.start - c.start, s.stop - c.start)
            for s, c in zip(block.spans, cover, strict=True)
        )
        host = hosts.pop()[inside]
        # Without a device the array stays free to follow others.
        placed += [jax.device_put(host, d) for d in block.devices or (None,)]
        jax.block_until_ready(placed)
        del host
        # JAX lets go of what it has copied when Python collects garbage.
        gc.collect(0)
    if sharding is None:
        return placed[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _cover(
    name: str, shape: tuple[int, ...], stacked: int, spans: Sequence[range]
) -> tuple[range, ...]:
    """Widen the ranges until each is one range in the file too."""
    cover = list(spans)
    for dims in file_dims(name, len(shape) - stacked):
        for d in dims[1:]:
            cover[stacked + d] = range(shape[stacked + d])
    return tuple(cover)


def _box(
    name: str, shape: tuple[int, ...], cover: Sequence[range]
) -> list[range]:
    """Locate a part of a layer in the file's tensor."""
    box = []
    for first, *rest in file_dims(name, len(shape)):
        inner = math.prod(shape[d] for d in rest)
        box.append(range(cover[first].start * inner, cover[first].stop * inner))
    return box


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
    advance: Advance,
) -> None:
    rows, *others = box
    row_bytes = 4 * math.prod(map(len, others))
    step = max(1, _PIECE_BYTES // row_bytes)
    for i in range(0, len(rows), step):
        parts = (rows[i : i + step], *others)
        piece = read(tensor, tuple(slice(p.start, p.stop) for p in parts))
        target[i : i + step] = piece
        advance(target[i : i + step].nbytes)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show a bar of bytes while a large model is read, and log its end.

    Args:
      label: the model's name.
      total: bytes that this process will place.

    Yields:
      What is to be called with the bytes of every piece.
    """
    large = total >= _SHOWN_BYTES
    started = time.perf_counter()
    with tqdm(
        total=total, desc=label, unit="B", unit_scale=True,
        disable=not (large and hosts.is_first()),
    ) as bar:  # fmt: skip
        yield bar.update
    if large:
        logging.info(
            "%s: %d bytes of parameters in %.1f s",
            label, total, time.perf_counter() - started,
        )  # fmt: skip
