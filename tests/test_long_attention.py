"""Attention a block of queries at a time is attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.models import DecoderConfig, causal_mask
from topd_jax.models.attention import core
from topd_jax.planning import hlo

CONFIG = DecoderConfig(
    vocab_size=40, layers=1, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24,
)  # fmt: skip
LENGTH = 300  # two blocks of 128 and a part


def inputs(dtype="float32", columns=LENGTH):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, LENGTH, 4, 8), dtype)
    key = jax.random.normal(keys[1], (2, columns, 2, 8), dtype)
    value = jax.random.normal(keys[2], (2, columns, 2, 8), dtype)
    exists = jnp.arange(LENGTH) >= jnp.array([[0], [20]])  # padding
    mask = causal_mask(exists)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, columns - LENGTH)))
    return query, key, value, mask[:, None]


def attend(query, key, value, mask, config):
    rows = jnp.zeros(query.shape[:2], jnp.int32)
    sight = core.Sight(mask, rows, None)
    return core.attend(query, key, value, sight, 0, config)


def value_and_gradients(query, key, value, mask, config):
    real = mask.any(-1)[:, 0, :, None, None]

    def loss(query, key, value):
        out = attend(query, key, value, mask, config)
        out = jnp.where(real, out.astype(jnp.float32), 0.0)
        return jnp.sum(jnp.sin(out) * jnp.arange(8)), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(core, "_LONG_SCORES", 1)
    monkeypatch.setattr(core, "_BLOCK_SCORES", 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("columns", [LENGTH, LENGTH + 50])
def test_value_and_gradients_are_those_of_the_whole(request, softcap, columns):
    config = dataclasses.replace(CONFIG, attention_softcap=softcap)
    given = inputs(columns=columns)
    wanted = value_and_gradients(*given, config)
    request.getfixturevalue("in_blocks")
    got = value_and_gradients(*given, config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        got,
        wanted,
    )


def test_gradients_of_keys_are_summed_in_float32(request):
    given = inputs("bfloat16")
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        given,
    )
    wanted = value_and_gradients(*wide, CONFIG)[1]
    request.getfixturevalue("in_blocks")
    got = value_and_gradients(*given, CONFIG)[1]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.abs(one.astype(np.float32) - other).max()
        assert error < 0.03 * np.abs(other).max()


def test_no_array_holds_all_scores(in_blocks):
    query, key, value, mask = inputs()

    def loss(query, key, value):
        return jnp.sum(attend(query, key, value, mask, CONFIG) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, value)
    program = hlo.parse(compiled.compile().as_text())
    largest = max(
        array.size
        for place in program.computations.values()
        for one in place.instructions.values()
        for array in one.arrays
        if array.dtype == "f32"
    )
    assert largest <= 2 * 4 * 128 * LENGTH  # a block's scores


def test_short_sequences_are_read_at_once():
    text = str(jax.make_jaxpr(lambda *a: attend(*a, CONFIG))(*inputs()))
    assert "scan" not in text and "while" not in text
