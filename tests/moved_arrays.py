"""Arrays between two meshes of two processes; run by test_processes."""

import itertools
import os
import sys

from children import simulated

os.environ["XLA_FLAGS"] = simulated(4)

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from topd_jax.parallel import hosts, moves, sharding

WAYS = (
    (),
    ("fsdp",),
    (None, "fsdp"),
    (("data", "fsdp"),),
    ("tensor", "fsdp"),
)


def main() -> None:
    hosts.start(sys.argv[1], 2, int(sys.argv[2]))
    # Half of each process's.
    ours, theirs = (
        [d for i, d in enumerate(jax.devices()) if i % 4 // 2 == half]
        for half in (0, 1)
    )
    for part in (ours, theirs):
        assert [d.process_index for d in part] == [0, 0, 1, 1]
    mesh = sharding.make_mesh(fsdp=2, devices=ours)
    table = np.arange(64, dtype=np.float32).reshape(8, 8)
    asked = 0
    gathered = moves._gathered

    def counted(x):
        nonlocal asked
        asked += 1
        return gathered(x)

    moves._gathered = counted
    for axes, here, there in itertools.product(
        (dict(tensor=4), dict(fsdp=4), dict(fsdp=2)), WAYS, WAYS
    ):
        other = sharding.make_mesh(devices=theirs, **axes)
        x = jax.make_array_from_callback(
            table.shape,
            NamedSharding(mesh, PartitionSpec(*here)),
            lambda index: table[index],
        )
        with jax.set_mesh(mesh):
            moved = moves.move(x, NamedSharding(other, PartitionSpec(*there)))
        assert moved.sharding.mesh == other
        np.testing.assert_array_equal(hosts.on_host(moved), table)
        if axes == dict(fsdp=2) and here == there:  # beside each other
            assert not asked, (here, asked)
        asked = 0
    with jax.set_mesh(mesh):
        key = jax.random.split(jax.random.key(3))[1]
        moved = moves.copy_to(key, other)
    np.testing.assert_array_equal(
        *(jax.random.key_data(k).addressable_data(0) for k in (key, moved))
    )
    print("all arrived")


if __name__ == "__main__":
    main()
