"""Child of test_flash_decode: rollouts by the kernel on a mesh of eight.

Each device reads the rows and heads that it has, by a kernel that knows
nothing of the others; what is written is what one device writes without.
"""

import jax
import numpy as np
from interpreted import interpreted_kernels
from sharded_rollout import CONFIG, IDS, prompts

from topd_jax.models import init_decoder
from topd_jax.parallel.sharding import (
    batch_shardings,
    make_mesh,
    tree_shardings,
)
from topd_jax.sampling import rollout

# Mesh, rollout.sharding, and (rows, kv heads) of a device: None where the
# heads and their keys would part, and the kernel is left aside.
CASES = (
    (dict(data=2, fsdp=2, tensor=2), "train", (8, 1)),
    (dict(data=4, fsdp=1, tensor=2), "tensor", (8, 1)),
    (dict(data=2, fsdp=2, tensor=2), "rows", (8, 1)),
    (dict(data=2, fsdp=2, tensor=2), "tensor", None),
)


def written(model, batch, sharding="train"):
    return rollout(
        model, batch, jax.random.key(1), max_new_tokens=9, samples=2,
        sharding=sharding, **IDS,
    )  # fmt: skip


def main() -> None:
    assert jax.device_count() == 8
    expected = written(init_decoder(CONFIG, jax.random.key(0)), prompts())
    model = init_decoder(CONFIG.replace(attention="flash"), jax.random.key(0))
    for shape, sharding, wanted in CASES:
        mesh = make_mesh(**shape)
        with jax.set_mesh(mesh), interpreted_kernels() as calls:
            batch = jax.device_put(prompts(), batch_shardings(prompts(), mesh))
            spread = tree_shardings(model, mesh, model.logical_axes)
            found = written(jax.device_put(model, spread), batch, sharding)
        held = {(s[1][1], s[1][2]) for name, s, _ in calls if name == "read"}
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.logp, expected.logp, atol=2e-4)
        assert held == ({wanted} if wanted else set()), held
        print(f"same on {shape} {sharding}: {sorted(held)}", flush=True)


if __name__ == "__main__":
    main()
