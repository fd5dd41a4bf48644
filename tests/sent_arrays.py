"""Arrays between meshes of different processes; run by test_processes.

What the devices of the first processes hold goes to those of the last, and
back; no process has devices of both.
"""

import itertools
import os
import sys

from children import simulated

os.environ["XLA_FLAGS"] = simulated(sys.argv[4])

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from topd_jax.parallel import hosts, moves, sharding, transfers
from topd_jax.parallel.teacher_mesh import divide

WAYS = ((), ("fsdp",), (None, "fsdp"), (("data", "fsdp"),), ("tensor", "fsdp"))
TABLE = np.arange(48 * 24, dtype=np.int32).reshape(48, 24)


def made(values, place):
    return jax.make_array_from_callback(
        values.shape, place, lambda index: values[index], dtype=values.dtype
    )


def require(x, values, mesh):
    """The parts are there, and nothing else."""
    assert x.sharding.mesh == mesh and x.dtype == values.dtype
    here = sum(
        d.process_index == jax.process_index() for d in mesh.devices.flat
    )
    assert len(x.addressable_shards) == here
    for shard in x.addressable_shards:
        assert same(np.asarray(shard.data), values[shard.index])


def same(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def spreads(mesh, other):
    """Every way to spread a matrix on one and on the other."""
    pairs = list(itertools.product(WAYS, WAYS))
    values = TABLE.astype(np.float32)
    here, there = (
        [NamedSharding(m, PartitionSpec(*pair[i])) for pair in pairs]
        for i, m in enumerate((mesh, other))
    )
    with jax.set_mesh(mesh):
        for back in (False, True):
            source, target = (there, here) if back else (here, there)
            found = moves.move([made(values, s) for s in source], target)
            for x, place in zip(found, target, strict=True):
                require(x, values, place.mesh)
                assert x.sharding.spec == place.spec


def kinds(mesh, other):
    """Any dtype, nothing, scalars and keys, all at once."""
    odd = np.array([[-0.0, np.nan], [np.inf, 1e-40]], np.float32)
    tree = {
        "odd": np.tile(odd, (24, 4)),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(-0.0).reshape(()),
    }
    for dtype in ("bfloat16", "int8", "int4", "uint32", "bool"):
        tree[dtype] = (TABLE % 7 > 3).astype(jnp.dtype(dtype))
    with jax.set_mesh(mesh):
        placed = {
            n: made(x, sharding.replicated(mesh)) for n, x in tree.items()
        }
        moved = moves.copy_to(placed, other)
        key = jax.random.split(jax.random.key(3))[1]
        there = moves.copy_to(key, other)
    for name, values in tree.items():
        require(moved[name], values, other)
    numbers = hosts.on_host([jax.random.key_data(k) for k in (key, there)])
    wanted = jax.random.key_data(jax.random.split(jax.random.key(3))[1])
    for found in numbers:
        np.testing.assert_array_equal(found, wanted)
    assert there.sharding.mesh == other
    # A jitted program takes what has come.
    with jax.set_mesh(other):
        drawn = jax.jit(lambda k: jax.random.uniform(k, (3,)))(there)
    require(drawn, np.asarray(jax.random.uniform(
        jax.random.wrap_key_data(numbers[0]), (3,))), other)  # fmt: skip


def readable(mesh, other):
    """What is of one mesh alone is read everywhere, what is local, locally."""
    own = jax.process_index()
    numbers = made(np.arange(12, dtype=np.int32), sharding.replicated(other))
    spread = made(TABLE, NamedSharding(mesh, PartitionSpec("fsdp")))
    tree = {"a": numbers, "b": (spread, 3), "c": jnp.arange(3) + own, "d": None}
    for found in (tree, transfers.within_reach(tree)):
        host = hosts.on_host(found)
        np.testing.assert_array_equal(host["a"], np.arange(12))
        np.testing.assert_array_equal(host["b"][0], TABLE)
        assert host["b"][1] == 3 and host["d"] is None
        np.testing.assert_array_equal(host["c"], np.arange(3) + own)
    read = jax.device_get(transfers.within_reach(numbers))
    np.testing.assert_array_equal(read, np.arange(12))


def main() -> None:
    address, index, count, _, own = sys.argv[1], *map(int, sys.argv[2:])
    hosts.start(address, count, index, heartbeat_seconds=10)
    ours, theirs = divide(jax.devices(), own)
    assert not {d.process_index for d in ours} & {
        d.process_index for d in theirs
    }
    mesh = sharding.make_mesh(fsdp=len(ours), devices=ours)
    for axes in (dict(fsdp=len(theirs)), dict(tensor=len(theirs))):
        spreads(mesh, sharding.make_mesh(devices=theirs, **axes))
    other = sharding.make_mesh(devices=theirs)
    kinds(mesh, other)
    kinds(other, mesh)
    readable(mesh, other)
    feeding = len({d.process_index for d in ours})
    place = index if index < feeding else 0
    assert hosts.share_of(mesh) == (place, feeding)
    print("all arrived")


if __name__ == "__main__":
    main()
