"""Soft-capped logits: in every loss, by hand and against dense ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from small_files import make
from small_heads import (
    DENSE,
    SHAPE,
    V,
    assert_close,
    gradients,
    heads,
    weights_of,
)

from topd_jax.evaluation.metrics import statistics
from topd_jax.losses import divergences, fused, trajectory
from topd_jax.models import DecoderConfig, unembed
from topd_jax.types import Candidates, CappedHead, Windows, soft_cap

CONFIG = DecoderConfig(
    vocab_size=40,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=24,
    final_softcap=3.0,
)

CAPS = (2.0, 3.0)


def capped_logp(hidden, rows, cap, temperature=1.0):
    logits = jnp.matmul(hidden, rows.T, precision="highest")
    logits = cap * jnp.tanh(logits / cap)
    return divergences.log_softmax(logits / temperature)


def with_caps(hidden, rows, teacher_hidden, teacher_rows):
    return (
        hidden,
        CappedHead(rows, CAPS[0]),
        teacher_hidden,
        CappedHead(teacher_rows, CAPS[1]),
    )


def test_by_hand():
    # 2 tanh(1 / 2), 2 tanh(-100 / 2)
    got = soft_cap(jnp.array([0.0, 1.0, -100.0]), 2.0)
    np.testing.assert_allclose(got, [0, 0.92423431, -2], rtol=1e-6)
    head = CappedHead(jnp.array([[1.0], [-100.0]]), 2.0)
    np.testing.assert_allclose(
        unembed(head, jnp.ones((1, 1))), [[0.92423431, -2]], rtol=1e-6
    )
    assert head.shape == (2, 1)
    np.testing.assert_array_equal(head[:1].rows, [[1.0]])
    assert head[:1].cap == 2.0


def test_the_cap_goes_through_jit_with_the_rows():
    head = CappedHead(jnp.ones((2, 1)), 2.0)
    got = jax.jit(lambda head: head)(head)
    assert got.cap == 2.0
    assert len(jax.tree.leaves(head)) == 1


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", DENSE)
def test_fused_equals_dense(name, chunk_size):
    arrays, weights = heads(), weights_of()

    def loss(*arrays):
        per_token = DENSE[name](
            capped_logp(*arrays[:2], CAPS[0], 0.7),
            capped_logp(*arrays[2:], CAPS[1], 0.7),
        )
        return jnp.sum(weights * per_token), per_token

    options = dict(
        divergence=name, beta=0.25, chunk_size=chunk_size, temperature=0.7
    )

    def recomputed(*arrays):
        per_token = fused.fused_divergence(*with_caps(*arrays), **options)
        return jnp.sum(weights * per_token), per_token

    def in_forward(*arrays):
        return fused.fused_weighted_sum(
            *with_caps(*arrays), weights=weights, **options
        )

    want = gradients(loss, arrays)
    plain = gradients(
        lambda *a: fused.fused_weighted_sum(*a, weights=weights, **options),
        arrays,
    )
    assert np.abs(plain[0][1] - want[0][1]).max() > 0.1
    for faced in (recomputed, in_forward):
        assert_close(gradients(faced, arrays), want)


def test_statistics_of_tokens_equal_dense_ones():
    arrays = heads()
    hidden, rows = arrays[:2]
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, SHAPE))
    want = capped_logp(hidden, rows, CAPS[0])
    head = CappedHead(rows, CAPS[0])
    got = fused.fused_token_logprobs(hidden, head, tokens, chunk_size=5)
    picked = jnp.take_along_axis(want, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, picked, atol=1e-5)
    got = fused.fused_map(
        lambda student, teacher: (student[:, 3], teacher[:, 3]),
        *with_caps(*arrays),
        chunk_size=5,
    )
    theirs = capped_logp(*arrays[2:], CAPS[1])
    np.testing.assert_allclose(got[0], want[..., 3], atol=1e-5)
    np.testing.assert_allclose(got[1], theirs[..., 3], atol=1e-5)
    got = fused.dropped_mass(hidden, head, 20, chunk_size=5)
    mass = jnp.exp(want[..., 20:]).sum(-1)
    np.testing.assert_allclose(got, mass, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_guidance_equals_dense(chunk_size):
    hidden, rows = heads()[:2]
    candidates = Candidates(jnp.array([[1], [4]]), jnp.ones((2, 1), bool))
    windows = Windows(
        jnp.array([[[3, 5]], [[7, 32]]]), jnp.ones((2, 1, 2), bool)
    )

    def total(hidden, rows, dense):
        if not dense:
            return trajectory.student_context_logprobs(
                hidden, CappedHead(rows, CAPS[0]), candidates, windows,
                chunk_size=chunk_size,
            )  # fmt: skip
        logp = capped_logp(hidden, rows, CAPS[0])
        starts = ((1, 0), (4, 1))
        return jnp.stack(
            [
                logp[b, s : s + 2][:, windows.tokens[b, 0]][None]
                for s, b in starts
            ]
        )

    def loss(dense, *arrays):
        out = total(*arrays, dense)
        return jnp.sum(out * jnp.arange(4.0).reshape(2, 2)), out

    got, want = (
        gradients(functools.partial(loss, dense), (hidden, rows))
        for dense in (False, True)
    )
    assert_close(got, want)


def test_evaluation_bounds_the_logits():
    """A cap near zero makes a model uniform, whatever its weights."""
    flat = make(dataclasses.replace(CONFIG, final_softcap=1e-6))
    found = jax.jit(statistics)(flat, make(CONFIG), make_trajectories())
    total, count = found["student_entropy"]
    np.testing.assert_allclose(total / count, np.log(40), rtol=1e-5)
    total, count = found["teacher_entropy"]
    assert total / count < np.log(40) - 0.01
