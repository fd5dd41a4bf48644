"""The attention kernels on a mesh of eight, interpreted; run by test_sharded.

Each device reads the rows, heads and queries that it has, by kernels that
know nothing of the others; the step is that of blocks on one device.
"""

import functools

import jax
from sharded_step import MIXTURE, assert_same, one_device, run_mixture

from topd_jax.models.attention import core, flash
from topd_jax.parallel import sharding

# data, fsdp, tensor, expert, sequence
MESHES = ((1, 2, 2, 1, 2), (2, 1, 2, 2, 1), (1, 1, 1, 1, 8))
LONG = dict(prompt=20, completion=131)


def main() -> None:
    assert jax.device_count() == 8
    expected = run_mixture(one_device(), **LONG)
    calls, by_platform = [], jax.lax.platform_dependent

    def on_tpu(*arrays, tpu, default):
        if not isinstance(tpu, functools.partial):  # of the experts
            return by_platform(*arrays, tpu=tpu, default=default)
        calls.append(arrays[0].shape)
        return tpu(*arrays)

    jax.lax.platform_dependent = on_tpu
    core.flash.Options = functools.partial(flash.Options, interpret=True)
    for shape in MESHES:
        calls.clear()
        mesh = sharding.make_mesh(*shape)
        config = MIXTURE.replace(attention="flash")
        assert_same(expected, run_mixture(mesh, config, **LONG))
        data, fsdp, tensor, expert, sequence = shape
        read = {s[:3] for s in calls}
        rows = 8 // (data * fsdp * expert)
        assert (rows, 160 // sequence, 8 // tensor) in read, read
        print(f"same on {shape}: {sorted(set(calls))}", flush=True)


if __name__ == "__main__":
    main()
