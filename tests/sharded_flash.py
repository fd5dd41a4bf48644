"""The attention kernels on a mesh of eight, interpreted; run by test_sharded.

Each device reads the rows, heads and queries that it has, by kernels that
know nothing of the others; the step is that of blocks on one device.
"""

import jax
from interpreted import interpreted_kernels
from sharded_step import MIXTURE, assert_same, one_device, run_mixture

from topd_jax.parallel import sharding

# data, fsdp, tensor, expert, sequence
MESHES = ((1, 2, 2, 1, 2), (2, 1, 2, 2, 1), (1, 1, 1, 1, 8))
LONG = dict(prompt=20, completion=131)


def main() -> None:
    assert jax.device_count() == 8
    expected = run_mixture(one_device(), **LONG)
    for shape in MESHES:
        mesh = sharding.make_mesh(*shape)
        config = MIXTURE.replace(attention="flash")
        with interpreted_kernels() as calls:
            assert_same(expected, run_mixture(mesh, config, **LONG))
        data, fsdp, tensor, expert, sequence = shape
        read = {shapes[0][:3] for _, shapes, _ in calls}
        rows = 8 // (data * fsdp * expert)
        assert (rows, 160 // sequence, 8 // tensor) in read, read
        print(f"same on {shape}: {sorted(read)}", flush=True)


if __name__ == "__main__":
    main()
