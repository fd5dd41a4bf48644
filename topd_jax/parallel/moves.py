"""Arrays from one mesh to another that shares no device with it (ours).

In one process JAX moves them. In several that have devices of both meshes,
every process moves what its own devices hold: from device to device where a
device of the other mesh wants just what one of its own has, through the host
where pieces must be put together or cut. Only where a process wants what none
of its devices hold do hosts exchange anything: the array is gathered first, on
the mesh it is on. Where some process has devices of the other mesh alone, the
devices send what moves (:mod:`topd_jax.parallel.transfers`).
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from topd_jax.parallel import transfers
from topd_jax.parallel.routes import Box, box
from topd_jax.parallel.sharding import batch_shardings, mesh_axes, replicated


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
      shardings: the same tree with a ``NamedSharding`` a leaf.

    Returns:
      The same arrays there; nothing waits but what goes through the host.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    leaves, structure = jax.tree.flatten(tree)
    places = structure.flatten_up_to(shardings)
    out = [_data(x) for x in leaves]
    sent: dict[tuple[Mesh, Mesh], list[int]] = {}
    for i, (x, where) in enumerate(zip(out, places, strict=True)):
        if _is_sent(x, where):
            sent.setdefault((_mesh_of(x), where.mesh), []).append(i)
        else:
            out[i] = _move(x, where)
    for those in sent.values():
        arrays, wheres = ([of[i] for i in those] for of in (out, places))
        found = transfers.send(arrays, wheres)
        for i, x in zip(those, found, strict=True):
            out[i] = x
    for i, x in enumerate(leaves):
        if _is_key(x):
            kind = jax.random.key_impl(x)
            out[i] = jax.random.wrap_key_data(out[i], impl=kind)
    return jax.tree.unflatten(structure, out)


def _is_sent(x: jax.Array, where: NamedSharding) -> bool:
    """Whether a program must send it; what each process has is its own."""
    spread = isinstance(x.sharding, NamedSharding)
    return spread and transfers.needed(_mesh_of(x), where.mesh)


def _is_key(x: jax.Array) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: jax.Array) -> jax.Array:
    """An array itself, or the numbers of a PRNG key."""
    if not _is_key(x):
        return x
    with jax.set_mesh(_mesh_of(x)):
        return jax.random.key_data(x)


def _move(x: jax.Array, where: NamedSharding) -> jax.Array:
    # What each process holds whole is in its reach.
    if not x.is_fully_addressable and not _in_reach(x.sharding, where, x.shape):
        x = _gathered(x)
    return _moved_within(x, where)


def _moved_within(x: jax.Array, where: NamedSharding) -> jax.Array:
    """Moves an array of which this process holds all that it wants."""
    held: dict[Box, list[jax.Array]] = {}
    for shard in x.addressable_shards:
        held.setdefault(box(shard.index, x.shape), []).append(shard.data)
    on_host = functools.cache(lambda own: np.asarray(held[own][0]))
    places = where.addressable_devices_indices_map(x.shape)
    out = []
    for i, index in enumerate(places.values()):
        own = box(index, x.shape)
        if own in held:  # taken from all that have it, in turn
            out.append(held[own][i % len(held[own])])
        else:
            out.append(_cut(own, held, on_host, x.dtype))
    out = jax.device_put(out, list(places))
    return jax.make_array_from_single_device_arrays(
        x.shape, where, out, dtype=x.dtype
    )


def _cut(own: Box, held: Any, on_host: Any, dtype: Any) -> np.ndarray:
    """A part of an array, put together of parts that are held."""
    out = np.empty([end - begin for begin, end in own], dtype)
    for other in held:
        both = _overlap(own, other)
        if _volume(both):
            there, here = (
                tuple(
                    slice(begin - start, end - start)
                    for (begin, end), (start, _) in zip(both, of, strict=True)
                )
                for of in (own, other)
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
            own.add(box(index, shape))
    return all(
        sum(_volume(_overlap(own, other)) for other in held.get(process, ()))
        == _volume(own)
        for process, boxes in wanted.items()
        for own in boxes
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


def _overlap(a: Box, b: Box) -> Box:
    return tuple(
        (max(x[0], y[0]), max(min(x[1], y[1]), max(x[0], y[0])))
        for x, y in zip(a, b, strict=True)
    )


def _volume(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)
