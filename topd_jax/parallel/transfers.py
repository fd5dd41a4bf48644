"""Arrays between meshes that have no process in common (ours).

No process holds devices of both, so none can hand anything on. One program
over the devices of both meshes does: an array is cut into pieces, as large as
lie in one part of it on either mesh; in every round each device sends one and
takes one at most (``jax.lax.ppermute``). Beside both meshes' own parts a device
holds a piece, and as much as a part of the other mesh. Nothing goes through a
host or waits on one: the program has its place among those of the devices.

A process without devices of a mesh calls every program of it all the same: for
JAX it is nothing to do there, and the arrays that come out have no parts.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from topd_jax.parallel.routes import Box, Route, box, route
from topd_jax.parallel.sharding import replicated

_LINE = PartitionSpec("line")


def owners(mesh: Mesh) -> frozenset[int]:
    """The processes that have devices of a mesh."""
    return frozenset(d.process_index for d in mesh.devices.flat)


def holders(mesh: Mesh | None) -> frozenset[int] | None:
    """The processes that have devices of a mesh, where these are not all."""
    if mesh is None or not _absent(mesh):
        return None
    return owners(mesh)


def needed(source: Mesh, target: Mesh) -> bool:
    """Whether what moves between two meshes must be sent by a program."""
    return not owners(target) <= owners(source)


def nothing_of(like: Any) -> jax.Array:
    """An array on a mesh of which this process has no device.

    Args:
      like: has its shape, dtype and sharding.
    """
    return _assembled(like, [])


def send(
    arrays: Sequence[jax.Array], places: Sequence[NamedSharding]
) -> list[jax.Array]:
    """Sends arrays of one mesh to another that shares no device with it.

    Args:
      arrays: on one mesh, no PRNG keys; every process must call this, with
        the same.
      places: where to, all on one mesh.

    Returns:
      The same arrays there.
    """
    if not arrays:
        return []
    scalars = [not x.ndim for x in arrays]
    with jax.set_mesh(arrays[0].sharding.mesh):  # they have no parts
        arrays = [x if x.ndim else x.reshape(1) for x in arrays]
    shapes, dtypes, sources = zip(
        *((x.shape, x.dtype, x.sharding) for x in arrays), strict=True
    )
    sent = sender(shapes, dtypes, sources, tuple(places))(arrays)
    with jax.set_mesh(places[0].mesh):
        pairs = zip(sent, scalars, strict=True)
        return [x.reshape(()) if scalar else x for x, scalar in pairs]


def within_reach(tree: Any) -> Any:
    """Arrays as every process can read them.

    Args:
      tree: of anything; the same in every process, which must all call this.

    Returns:
      The tree. Of an array on a mesh without devices of some process it has
      a whole copy on one device of this process; nothing is waited for.
    """
    leaves, structure = jax.tree.flatten(tree)
    far: dict[Mesh, list[int]] = {}
    for i, x in enumerate(leaves):
        place = x.sharding if isinstance(x, jax.Array) else None
        if isinstance(place, NamedSharding) and _absent(place.mesh):
            far.setdefault(place.mesh, []).append(i)
    for mesh, places in far.items():
        found = _shared([leaves[i] for i in places], mesh)
        for i, x in zip(places, found, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=64)
def _absent(mesh: Mesh) -> tuple[jax.Device, ...]:
    """The devices of all processes that have none of a mesh.

    All of them: TPUs of several hosts take no program of a chip of each.
    """
    having = owners(mesh)
    return tuple(d for d in jax.devices() if d.process_index not in having)


def _shared(arrays: list[jax.Array], mesh: Mesh) -> list[jax.Array]:
    copies = Mesh(np.array(_absent(mesh)), ("copy",))
    kinds = tuple((x.shape, x.dtype) for x in arrays)
    with jax.set_mesh(mesh):
        packed = _packer(kinds, replicated(mesh))(arrays)
    sent = send(packed, [replicated(copies)] * len(packed))
    if jax.process_index() not in owners(mesh):
        mesh, packed = copies, sent
    with jax.set_mesh(mesh):
        found = _unpacker(kinds, replicated(mesh))(packed)
    return [x.addressable_data(0) for x in found]


@functools.lru_cache(maxsize=64)
def _packer(kinds: tuple, place: NamedSharding) -> Any:
    """Arrays -> one vector for each of their dtypes."""

    def pack(arrays: list[jax.Array]) -> list[jax.Array]:
        return [
            jnp.concatenate([x.ravel() for x in arrays if x.dtype == dtype])
            for dtype in dict.fromkeys(dtype for _, dtype in kinds)
        ]

    return jax.jit(pack, out_shardings=place)


@functools.lru_cache(maxsize=64)
def _unpacker(kinds: tuple, place: NamedSharding) -> Any:
    """The other way round."""

    def unpack(packed: list[jax.Array]) -> list[jax.Array]:
        rest, out = {x.dtype: x for x in packed}, []
        for shape, dtype in kinds:
            size = math.prod(shape)
            out.append(rest[dtype][:size].reshape(shape))
            rest[dtype] = rest[dtype][size:]
        return out

    return jax.jit(unpack, out_shardings=place)


class Sender:
    """The program that sends some arrays, for all that are like them.

    Attributes:
      program: jitted; takes and gives one array for each of them, of every
        device's part, one behind the other.
      operands: the shapes of what it takes.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[Any],
        sources: Sequence[NamedSharding],
        places: Sequence[NamedSharding],
    ) -> None:
        """Finds the routes.

        Args:
          shapes: of the arrays.
          dtypes: of the arrays.
          sources: where they are, all on one mesh.
          places: where they go, all on one other.
        """
        here, there = (list(s[0].mesh.devices.flat) for s in (sources, places))
        self._line = Mesh(np.array([*here, *there]), ("line",))
        self._end = Mesh(np.array(there), ("line",))
        self._shapes, self._places = shapes, places
        routes = [
            route(*(_boxes(s, shape) for s in (source, place)))
            for shape, source, place in zip(
                shapes, sources, places, strict=True
            )
        ]
        self.operands = _operands(routes, dtypes, self._line)

        def send_all(*parts: jax.Array) -> list[jax.Array]:
            return [
                _sent(part, way, len(here), len(there))
                for part, way in zip(parts, routes, strict=True)
            ]

        self.program = jax.jit(
            jax.shard_map(
                send_all, mesh=self._line, in_specs=_LINE, out_specs=_LINE,
                check_vma=False,
            )
        )  # fmt: skip
        # What the devices of the target put in: nothing, in the same shape.
        blank = _operands(routes, dtypes, self._end)
        self._blanks = jax.jit(
            lambda: [jnp.zeros(x.shape, x.dtype) for x in blank],
            out_shardings=NamedSharding(self._end, _LINE),
        )

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Sends them."""
        with jax.set_mesh(self._end):
            blanks = self._blanks()
        parts = []
        for x, blank, like in zip(arrays, blanks, self.operands, strict=True):
            own = [s.data for s in (*_shards(x), *_shards(blank))]
            parts.append(_assembled(like, own))
        with jax.set_mesh(self._line):
            sent = self.program(*parts)
        out = []
        for x, shape, place in zip(
            sent, self._shapes, self._places, strict=True
        ):
            own = {s.device: s.data for s in x.addressable_shards}
            order = place.addressable_devices_indices_map(shape)
            like = jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)
            out.append(_assembled(like, [own[device] for device in order]))
        return out


sender = functools.lru_cache(maxsize=512)(Sender)


def _operands(
    routes: Sequence[Route], dtypes: Sequence[Any], mesh: Mesh
) -> list[jax.ShapeDtypeStruct]:
    """Of every device a part as the source has them, one behind the other."""
    place = NamedSharding(mesh, _LINE)
    return [
        jax.ShapeDtypeStruct(
            (mesh.size * way.held[0], *way.held[1:]), dtype, sharding=place
        )
        for way, dtype in zip(routes, dtypes, strict=True)
    ]


def _shards(x: jax.Array) -> list[Any]:
    """In the order of the devices on a line: as in the mesh."""
    order = {d: i for i, d in enumerate(x.sharding.mesh.devices.flat)}
    return sorted(x.addressable_shards, key=lambda s: order[s.device])


def _assembled(like: Any, parts: list[jax.Array]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
        like.shape, like.sharding, parts, dtype=like.dtype
    )


def _sent(part: jax.Array, way: Route, here: int, there: int) -> jax.Array:
    """Inside the program: a device's part at the target, if it has one."""
    me = jax.lax.axis_index("line")
    out = jnp.zeros(way.wanted, part.dtype)
    for pieces in way.rounds:
        cut = np.zeros((here + there, len(way.piece)), np.int32)
        put, takes = np.zeros_like(cut), np.zeros(here + there, bool)
        pairs = []
        for p in pieces:
            target = here + p.target
            pairs.append((p.source, target))
            cut[p.source], put[target], takes[target] = p.cut, p.put, True
        cut, put, takes = (jnp.asarray(x)[me] for x in (cut, put, takes))
        piece = jax.lax.dynamic_slice(part, list(cut), way.piece)
        piece = jax.lax.ppermute(piece, "line", pairs)
        # Selected, not added: -0.0 + 0.0 has other bits.
        before = jax.lax.dynamic_slice(out, list(put), way.piece)
        piece = jnp.where(takes, piece, before)
        out = jax.lax.dynamic_update_slice(out, piece, list(put))
    return out


def _boxes(place: NamedSharding, shape: tuple[int, ...]) -> list[Box]:
    """Of each device of the mesh, in its order."""
    found = place.devices_indices_map(shape)
    return [box(found[device], shape) for device in place.mesh.devices.flat]
