"""How the chunked losses work: types, memory, products, devices."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from children import simulated
from small_heads import D, V, both_faces, dense, gradients, heads, weights_of

from topd_jax.losses import chunks, divergences, fused


def test_bfloat16_accumulates_in_float32():
    # 512 tokens, each adding a little to the same entries of the head's
    # gradient: a bfloat16 sum would lose what is below 1/256 of it.
    rng = np.random.default_rng(0)
    state, head, teacher_head = rng.normal(size=(3, V, D))
    arrays = (
        jnp.asarray(np.tile(state[:1], (512, 1)), jnp.bfloat16),
        jnp.asarray(head, jnp.bfloat16),
        jnp.asarray(np.tile(state[1:2], (512, 1)), jnp.bfloat16),
        jnp.asarray(teacher_head, jnp.bfloat16),
    )
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    weights = jnp.ones(512)

    def loss(*arrays):
        per_token = dense("reverse_kl", arrays)
        return jnp.sum(weights * per_token), per_token

    want = gradients(loss, wide)

    def mapped(*arrays):
        per_token = fused.fused_map(
            divergences.reverse_kl, *arrays, chunk_size=1
        )
        return jnp.sum(weights * per_token), per_token

    for (value, per_token), grads in (
        *both_faces(arrays, weights, chunk_size=1),
        gradients(mapped, arrays),
    ):
        assert value.dtype == per_token.dtype == jnp.float32
        np.testing.assert_allclose(value, want[0][0], 1e-5)
        for got, exact in zip(grads, want[1], strict=True):
            assert got.dtype == jnp.bfloat16
            scale = np.abs(exact).max()
            error = np.abs(np.asarray(got, np.float32) - exact).max()
            assert error < 0.01 * scale


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from equations(sub)


def traced(fn, *args):
    return list(equations(jax.make_jaxpr(fn)(*args).jaxpr))


def largest(eqns):
    return max(math.prod(v.aval.shape) for e in eqns for v in e.outvars)


def test_no_array_of_all_logits():
    shape, vocab = (2, 64), 512
    arrays, weights = heads(shape, (vocab, vocab)), weights_of(shape)
    tokens = jnp.zeros(shape, jnp.int32)
    logits = math.prod(shape) * vocab

    def whole(*arrays):
        return jnp.sum(dense("reverse_kl", arrays))

    assert largest(traced(jax.grad(whole, (0, 1)), *arrays)) == logits
    faces = {
        "divergence": lambda *a: jnp.sum(
            fused.fused_divergence(*a, chunk_size=8)
        ),
        "weighted_sum": lambda *a: fused.fused_weighted_sum(
            *a, weights, chunk_size=8
        )[0],
        "map": lambda *a: jnp.sum(
            fused.fused_map(divergences.reverse_kl, *a, chunk_size=8)
        ),
        "token_logprobs": lambda *a: jnp.sum(
            fused.fused_token_logprobs(*a[:2], tokens, chunk_size=8)
        ),
    }
    for name, face in faces.items():
        grad = jax.grad(face, (0, 1))
        assert largest(traced(grad, *arrays)) <= logits / 8, name
        memory = jax.jit(grad).lower(*arrays).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * logits, name


def products(fn, *args):
    return sum(e.primitive.name == "dot_general" for e in traced(fn, *args))


def test_products_are_computed_once():
    arrays, weights = heads(), weights_of()

    def total(*arrays):
        return fused.fused_weighted_sum(*arrays, weights, chunk_size=4)[0]

    def per_token(*arrays):
        return jnp.sum(fused.fused_divergence(*arrays, chunk_size=4))

    # Student and teacher; with gradients two more, and none of it twice.
    assert products(total, *arrays) == 2
    assert products(jax.grad(total, (0, 1)), *arrays) == 4
    assert products(per_token, *arrays) == 2
    assert products(jax.grad(per_token, (0, 1)), *arrays) == 6


def test_chunk_size_from_the_shapes():
    for vocab in (1, 100, 4096, 32768, 151_936, 10**7):
        tokens = chunks.chunk_tokens(vocab)
        assert 256 <= tokens <= 4096
        assert tokens in (256, 4096) or tokens * vocab * 4 <= 2**25
    assert chunks.chunk_tokens(32768) == 256
    # Small problems run in one chunk, without a scan.
    arrays = heads()
    names = {e.primitive.name for e in traced(fused.fused_divergence, *arrays)}
    assert "scan" not in names


# Several devices.

SHARDED = """
import json, jax, numpy as np
from topd_jax.parallel import sharding
from small_heads import heads, weights_of
from topd_jax.losses.fused import fused_weighted_sum, fused_divergence
from topd_jax.losses.chunks import chunk_tokens
shape = (8, 6)
arrays, weights = heads(shape, (32, 32)), weights_of(shape)
def run(*a):
    face = lambda *a: fused_weighted_sum(*a, weights, chunk_size=16)
    again = lambda *a: (weights * fused_divergence(*a, chunk_size=16)).sum()
    return (jax.value_and_grad(face, (0, 1), has_aux=True)(*a),
            jax.value_and_grad(again, (0, 1))(*a))
one = jax.jit(run)(*arrays)
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
axes = [("batch", None, None), ("vocab", "embed")] * 2
placed = [jax.device_put(x, sharding.named(mesh, x.shape, a))
          for x, a in zip(arrays, axes)]
with jax.set_mesh(mesh):
    many = jax.jit(run)(*placed)
    size = chunk_tokens(32768)
gaps = [float(np.abs(np.asarray(x) - np.asarray(y)).max()
              / max(1, np.abs(np.asarray(x)).max()))
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many))]
print(json.dumps({"gap": max(gaps), "tokens": size}))
"""


def test_eight_devices_equal_one():
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": simulated(8),
            "PYTHONPATH": ":".join(
                [str(pathlib.Path(__file__).parent), *sys.path]
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["gap"] < 3e-6  # of the largest value
    # Per device: half the vocabulary, a quarter of the rows.
    assert report["tokens"] == 2 * 4 * 256
