"""Run in a process of its own: a quantised model on 8 devices equals one."""

import jax
import jax.numpy as jnp
import numpy as np
from small_files import logits_of
from test_experts import CONFIG, make

from topd_jax.models import fingerprint
from topd_jax.models.quantization import quantize, quantizer
from topd_jax.parallel import sharding

# data, fsdp, tensor, expert
MESHES = {"int8": (1, 4, 2, 1), "int4": (1, 2, 2, 2)}


def states(model, mesh):
    tokens = jax.random.randint(jax.random.key(0), (8, 6), 3, 40)
    mask = jnp.arange(6) >= jnp.arange(8)[:, None] % 4
    with jax.set_mesh(mesh):
        batch = (tokens, mask)
        batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
        return np.asarray(logits_of(model, *batch))


def main() -> None:
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    for kind, shape in MESHES.items():
        whole = quantize(make(CONFIG), kind, tile=4 if kind == "int4" else 0)
        want = states(whole, one)
        mesh = sharding.make_mesh(*shape)
        shards = sharding.tree_shardings(whole, mesh, whole.logical_axes)
        # Quantised and then spread, or spread and then quantised.
        moved = jax.device_put(whole, shards)
        floats = make(CONFIG)
        shards = sharding.tree_shardings(floats, mesh, floats.logical_axes)
        floats = jax.device_put(floats, shards)
        finish = quantizer(kind, tile=4 if kind == "int4" else 0)
        arrays = {n: finish(n, x) for n, x in floats.arrays.items()}
        made = floats.__class__(CONFIG, arrays)
        for x, y in zip(
            jax.tree.leaves(moved), jax.tree.leaves(made), strict=True
        ):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        held = made.arrays["expert_up"].qvalue
        ways = int(np.prod(shape))
        assert held.addressable_shards[0].data.size * ways == held.size
        assert fingerprint(made) == fingerprint(whole)
        np.testing.assert_allclose(states(made, mesh), want, atol=2e-5)
        print(f"{kind}: same on {shape}", flush=True)


if __name__ == "__main__":
    main()
