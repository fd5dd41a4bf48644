"""A process of eight devices that loads a model when told, watched by
test_streaming.py, and then looks where a small one lies."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from topd_jax.models import drop_layers, fingerprint, load
from topd_jax.parallel.rules import RULES, using
from topd_jax.parallel.sharding import make_mesh


def check_places(path, mesh):
    """Spread by the rules of a student and a teacher, and all the same."""
    one, _ = load(path)
    model, _ = load(path, mesh=mesh)
    for name, array in model.arrays.items():
        assert (array == one.arrays[name]).all(), name
    shard = model.arrays["gate"].sharding.shard_shape((3, 32, 64))
    assert shard == (3, 16, 32), shard
    with using(RULES | {"embed": None}):
        teacher, _ = load(path, mesh=mesh)
    shard = teacher.arrays["gate"].sharding.shard_shape((3, 32, 64))
    assert shard == (3, 32, 32), shard
    assert fingerprint(one) == fingerprint(model) == fingerprint(teacher)
    student = drop_layers(model, [0, 2])
    spec = model.arrays["q"].sharding.spec
    assert student.arrays["q"].sharding.spec == spec
    assert fingerprint(student) == fingerprint(drop_layers(one, [0, 2]))
    words = r"must be divisible by the mesh axes tensor \(8\)"
    with pytest.raises(ValueError, match=words):
        load(path, mesh=make_mesh(1, 1, 8))


def main(path: str, small: str) -> None:
    assert jax.device_count() == 8
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
    check_places(small, mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
