"""Child of test_slots: slots on 8 devices write what one device writes."""

import re

import jax
import numpy as np
from sharded_rollout import CONFIG, IDS, prompts

from topd_jax.models.decoder import init_decoder
from topd_jax.parallel.sharding import (
    batch_shardings,
    make_mesh,
    tree_shardings,
)
from topd_jax.sampling import rollout

NEW, SLOTS = 24, 8
MIXED = dict(data=2, fsdp=2, tensor=2)
CASES = (
    (dict(data=8), "train"),
    (MIXED, "rows"),
    (MIXED, "tensor"),
    (dict(data=2, fsdp=1, tensor=2, sequence=2), "gathered"),
)


def write(model, batch, slots=0, sharding="train"):
    return rollout(
        model, batch, jax.random.key(1), max_new_tokens=NEW, samples=2,
        slots=slots, sharding=sharding, **IDS,
    )  # fmt: skip


def largest_moved(program: str) -> int:
    """Return the most numbers that a device receives at once."""
    shapes = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(",
        program,
    )
    return max(int(np.prod([int(n) for n in s.split(",") if n] or [1]))
               for s in shapes)  # fmt: skip


def main() -> None:
    model = init_decoder(CONFIG, jax.random.key(0))
    one = write(model, prompts())
    for shape, sharding in CASES:
        mesh = make_mesh(**shape)
        with jax.set_mesh(mesh):
            batch = jax.device_put(prompts(), batch_shardings(prompts(), mesh))
            spread = tree_shardings(model, mesh, model.logical_axes)
            program = jax.jit(write, static_argnums=(2, 3)).lower(
                jax.device_put(model, spread), batch, SLOTS, sharding
            )
            program = program.compile()
            out = program(jax.device_put(model, spread), batch)
        for name in ("prompt", "tokens", "mask", "truncated"):
            np.testing.assert_array_equal(
                getattr(out, name), getattr(one, name), err_msg=sharding
            )
        np.testing.assert_allclose(out.logp, one.logp, atol=1e-5)
        # A device's slots have so many numbers of keys in a layer's cache.
        parts = 8 // shape.get("tensor", 1)
        cache = SLOTS // parts * CONFIG.kv_heads * CONFIG.head_dim * (8 + NEW)
        assert largest_moved(program.as_text()) < cache
    print("equal")


if __name__ == "__main__":
    main()
