"""Arrays from one mesh to another that shares no device with it (ours).

In one process JAX moves them. In several, every process moves what its own
devices hold: from device to device where a device of the other mesh wants just
what one of its own has, through the host where pieces must be put together or
cut. Only where a process wants what none of its devices hold do hosts exchange
anything: the array is gathered first, on the mesh it is on.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from topd_jax.sharding import batch_shardings, mesh_axes, replicated

# Of each dimension where a part begins and ends.
Box = tuple[tuple[int, int], ...]


def move_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Rows of a batch, spread over another mesh.

    Args:
      tree: of arrays [B, ...].
      mesh: where to; B divides over it.

    Returns:
      The same arrays there.
    """
    return move(tree, batch_shardings(tree, mesh))


def copy_to(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Small arrays, whole on every device of another mesh.

    Args:
      tree: of arrays.
      mesh: where to.

    Returns:
      The same arrays there.
    """
    return move(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def move(tree: Any, shardings: Any) -> Any:
    """Arrays, placed otherwise.

    Args:
      tree: of arrays; the same in every process, which must all call this.
      shardings: the same tree with a ``NamedSharding`` a leaf, of a mesh on
        which every process that holds the arrays has devices.

    Returns:
      The same arrays there; nothing waits but what goes through the host.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_move, tree, shardings)


def _move(x: jax.Array, where: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        with jax.set_mesh(_mesh_of(x)):
            data = jax.random.key_data(x)
        return jax.random.wrap_key_data(
            _move(data, where), impl=jax.random.key_impl(x)
        )
    # What each process holds whole is in its reach.
    if not x.is_fully_addressable and not _in_reach(
        x.sharding, where, x.shape
    ):
        x = _gathered(x)
    return _moved_within(x, where)


def _moved_within(x: jax.Array, where: NamedSharding) -> jax.Array:
    """Moves an array of which this process holds all that it wants."""
    held: dict[Box, list[jax.Array]] = {}
    for shard in x.addressable_shards:
        held.setdefault(_box(shard.index, x.shape), []).append(shard.data)
    on_host = functools.cache(lambda box: np.asarray(held[box][0]))
    places = where.addressable_devices_indices_map(x.shape)
    out = []
    for i, index in enumerate(places.values()):
        box = _box(index, x.shape)
        if box in held:  # taken from all that have it, in turn
            out.append(held[box][i % len(held[box])])
        else:
            out.append(_cut(box, held, on_host, x.dtype))
    out = jax.device_put(out, list(places))
    return jax.make_array_from_single_device_arrays(x.shape, where, out)


def _cut(box: Box, held: Any, on_host: Any, dtype: Any) -> np.ndarray:
    """A part of an array, put together of parts that are held."""
    out = np.empty([end - begin for begin, end in box], dtype)
    for other in held:
        both = _overlap(box, other)
        if _volume(both):
            there, here = (
                tuple(
                    slice(begin - start, end - start)
                    for (begin, end), (start, _) in zip(both, of, strict=True)
                )
                for of in (box, other)
            )
            out[there] = on_host(other)[here]
    return out


@functools.lru_cache(maxsize=1024)
def _in_reach(
    source: Sharding, where: NamedSharding, shape: tuple[int, ...]
) -> bool:
    """Whether every process holds all that its devices shall have.

    The same in every process, for what follows runs on all of them.
    """
    held, wanted = ({}, {})
    for of, boxes in ((source, held), (where, wanted)):
        for device, index in of.devices_indices_map(shape).items():
            own = boxes.setdefault(device.process_index, set())
            own.add(_box(index, shape))
    return all(
        sum(_volume(_overlap(box, other)) for other in held.get(process, ()))
        == _volume(box)
        for process, boxes in wanted.items()
        for box in boxes
    )


def _gathered(x: jax.Array) -> jax.Array:
    """An array of which every process holds all, among its devices."""
    mesh = _mesh_of(x)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    within = {
        name
        for axis, name in enumerate(mesh.axis_names)
        if (owners == owners.take([0], axis)).all()
    }
    spec = PartitionSpec(
        *(
            tuple(name for name in mesh_axes(part) if name in within) or None
            for part in x.sharding.spec
        )
    )
    with jax.set_mesh(mesh):
        return _respread(NamedSharding(mesh, spec))(x)


@functools.lru_cache(maxsize=64)
def _respread(where: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=where)


def _mesh_of(x: jax.Array) -> jax.sharding.Mesh:
    return x.sharding.mesh


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )


def _overlap(a: Box, b: Box) -> Box:
    return tuple(
        (max(x[0], y[0]), max(min(x[1], y[1]), max(x[0], y[0])))
        for x, y in zip(a, b, strict=True)
    )


def _volume(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)
