"""A process that loads a model when told, watched by test_streaming.py."""

import json
import sys

import jax.numpy as jnp

from topd_jax.models import load
from topd_jax.parallel.sharding import make_mesh


def main(path: str, small: str) -> None:
    mesh = make_mesh(2, 2, 2)
    jnp.ones(3).block_until_ready()  # what JAX itself needs is there
    load(small, mesh=mesh)  # and what the reader's libraries do
    print("ready", flush=True)
    sys.stdin.readline()
    model, _ = load(path, mesh=mesh)
    arrays = model.arrays.values()
    held = sum(s.data.nbytes for x in arrays for s in x.addressable_shards)
    found = {"held": held, "largest": max(x.nbytes for x in arrays)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
