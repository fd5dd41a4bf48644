"""Run in a process of its own: a mixture on 8 devices equals one device.

Logits, gradients and the text of a rollout, with experts spread over the
expert axis, alone and beside the other axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from test_experts import CONFIG, make

from topd_jax.models import causal_mask, unembed
from topd_jax.parallel import sharding
from topd_jax.sampling import rollout
from topd_jax.types import Prompts, positions_of

# (data, fsdp, tensor, expert), and the rules of rollouts
MESHES = (
    ((1, 1, 1, 4), "train"), ((2, 1, 1, 4), "train"),
    ((1, 2, 2, 2), "tensor"), ((2, 2, 1, 2), "gathered"),
    ((1, 2, 2, 2), "rows"),
)  # fmt: skip


def loss(model, tokens, mask):
    hidden, _ = model(tokens, positions_of(mask), causal_mask(mask))
    logp = jax.nn.log_softmax(unembed(model.head, hidden))
    return jnp.sum(logp[..., 3] * mask), logp


def run(config, mesh, rules="train"):
    model = make(config)
    tokens = jax.random.randint(jax.random.key(0), (8, 6), 3, 40)
    mask = jnp.arange(6) >= jnp.arange(8)[:, None] % 4
    shards = sharding.tree_shardings(model, mesh, model.logical_axes)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, shards)
        if mesh.shape["expert"] > 1:
            held = model.arrays["expert_gate"]
            assert held.addressable_shards[0].data.shape[1] < config.experts
        batch = (tokens, mask)
        batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
        slope, logp = jax.jit(jax.grad(loss, has_aux=True))(model, *batch)
        written = rollout(
            model, Prompts(*batch), jax.random.key(0), max_new_tokens=6,
            temperature=0.0, eos_ids=(), pad_id=0, sharding=rules,
        )  # fmt: skip
    return jax.device_get((slope.arrays, logp, written.tokens))


def main() -> None:
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    want = run(CONFIG, one)
    for shape, rules in MESHES:
        used = jax.devices()[: int(np.prod(shape))]
        mesh = sharding.make_mesh(*shape, devices=used)
        for x, y in zip(
            jax.tree.leaves(want),
            jax.tree.leaves(run(CONFIG, mesh, rules)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)
        print(f"same on {shape}", flush=True)


if __name__ == "__main__":
    main()
