"""Layers that keep a recurrent state, in everything that a decoder does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_files import RECURRENT, adapted, assert_same, logits_of, make

from topd_jax.models import (
    Lora,
    causal_mask,
    load,
    merge_lora,
    save_model,
    unembed,
)
from topd_jax.models.attention.cache import Cache
from topd_jax.models.attention.masks import (
    BranchMask,
    causal_intervals,
    packed_intervals,
)
from topd_jax.models.decoder import drop_layers
from topd_jax.models.io.peft import load_adapter, save_adapter
from topd_jax.models.layerwise import split_cache, unstack
from topd_jax.models.parameters import arrays_of
from topd_jax.models.quantization import dequantize, quantize
from topd_jax.models.recurrence import (
    TokenOrder,
    empty_states,
    read_tokens,
    token_order,
)
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

SHALLOW = dataclasses.replace(RECURRENT, layers=2, recurrent=(True, False))
UNROLLED = dataclasses.replace(RECURRENT, unroll=4)
KEY = jax.random.key(0)


def tokens_of(rows, length):
    return jax.random.randint(KEY, (rows, length), 3, RECURRENT.vocab_size)


@jax.jit
def read_packed(model, tokens, positions, segments):
    hidden, _ = model(tokens, positions, packed_intervals(segments))
    return unembed(model.head, hidden)


def test_padding_and_segments_leave_no_trace():
    """Rows alone; padded on the left with noise; packed behind each other."""
    model, tokens = make(SHALLOW), tokens_of(2, 7)
    want = logits_of(model, tokens)
    noise = tokens_of(2, 5)
    padded = jnp.concatenate([noise, tokens], axis=1)
    got = logits_of(model, padded, jnp.arange(12) >= jnp.full((2, 1), 5))
    np.testing.assert_allclose(got[:, 5:], want, atol=1e-4)
    got = read_packed(
        model,
        jnp.concatenate([*tokens, noise[0]])[None],
        jnp.concatenate([jnp.arange(7), jnp.arange(7), jnp.arange(5)])[None],
        jnp.repeat(jnp.arange(3), np.array([7, 7, 5]))[None],
    )
    np.testing.assert_allclose(got[0, :14].reshape(want.shape), want, atol=1e-4)


def by_hand(w, mixed, rate, step):
    """The layer of one segment in float64, a token and a head at a time."""
    mixed, rate, step = (np.asarray(x, float) for x in (mixed, rate, step))
    taps, heads, (k, v) = w["delta_conv"][:, 0], 4, (4, 6)
    states, outs = np.zeros((heads, k, v)), []
    for t in range(len(mixed)):
        x = sum(
            taps[:, -1 - back] * mixed[t - back]
            for back in range(min(3, t + 1))
        )
        x = x / (1 + np.exp(-x))
        query, key = x[: 2 * k].reshape(2, k), x[2 * k : 4 * k].reshape(2, k)
        value = x[4 * k :].reshape(heads, v)
        decay = np.exp(w["delta_a_log"]) * np.log1p(
            np.exp(step[t] + w["delta_dt_bias"])
        )
        for h in range(heads):
            q, key_h = query[h // 2], key[h // 2]
            q = q / np.sqrt(q @ q + 1e-6) / np.sqrt(k)
            key_h = key_h / np.sqrt(key_h @ key_h + 1e-6)
            old = np.exp(-decay[h]) * states[h]
            learned = value[h] - old.T @ key_h
            learned = learned / (1 + np.exp(-rate[t, h]))
            states[h] = old + np.outer(key_h, learned)
            outs.append(states[h].T @ q)
    return np.reshape(outs, (-1, heads, v))


def test_a_layer_is_what_is_written_by_hand():
    """Two segments of a row, and tokens that go on with the last of them."""
    rng = np.random.default_rng(0)
    layer = arrays_of(RECURRENT, make(RECURRENT).arrays, 0)
    w = {n: np.asarray(x, float) for n, x in layer.items() if "delta" in n}
    inputs = [
        jnp.asarray(rng.normal(size=(1, 9, n)), jnp.float32) for n in (40, 4, 4)
    ]
    want = np.concatenate(
        [by_hand(w, *(x[0, at] for x in inputs))
         for at in (slice(0, 5), slice(5, 9))]
    )  # fmt: skip
    cache = Cache(None, None, jnp.zeros((), jnp.int32))
    states, newest = empty_states(RECURRENT, (1,))
    cache = cache.replace(states=states, inputs=newest)
    packed = token_order(
        packed_intervals(jnp.asarray([[0] * 5 + [1]])).widen(9), cache, 6
    )
    read = jax.jit(read_tokens, static_argnums=0)
    outs, last = [], TokenOrder(jnp.ones((1, 1), bool))
    for start, stop, order in ((0, 6, packed), (6, 7, last), (7, 8, last)):
        part = [x[:, start:stop] for x in inputs]
        out, cache = read(RECURRENT, layer, part, cache, None, order)
        outs.append(out[0])
    np.testing.assert_allclose(jnp.concatenate(outs), want[:8], atol=1e-5)


def test_tokens_are_the_same_in_a_row_and_one_by_one_in_bfloat16():
    """Else a rollout is not what its losses read."""
    config = RECURRENT.replace(dtype="bfloat16")
    rng, ones = np.random.default_rng(0), jnp.ones((2, 4), bool)
    layer = {
        n: x.astype("bfloat16")
        for n, x in arrays_of(RECURRENT, make(RECURRENT).arrays, 0).items()
    }
    inputs = [
        jnp.asarray(rng.normal(size=(2, 4, n)), "bfloat16") for n in (40, 4, 4)
    ]
    read = jax.jit(read_tokens, static_argnums=0)
    order = token_order(causal_intervals(ones), None, 4)
    want, _ = read(config, layer, inputs, None, None, order)
    cache = Cache(None, None, jnp.zeros((), jnp.int32))
    states, newest = empty_states(config, (2,))
    cache = cache.replace(states=states, inputs=newest)
    for i in range(4):
        part = [x[:, i : i + 1] for x in inputs]
        order = TokenOrder(ones[:, :1])
        got, cache = read(config, layer, part, cache, None, order)
        np.testing.assert_allclose(got[:, 0], want[:, i], atol=1e-5)


def test_a_gap_begins_no_segment():
    exists = jnp.asarray([[0, 0, 1, 1, 0, 0, 1, 0, 0], [1] * 7 + [0] * 2]) > 0
    want = token_order(causal_intervals(exists), None, 9)
    got = token_order(causal_mask(exists), None, 9)
    np.testing.assert_array_equal(got.exists, want.exists)
    started = jnp.cumsum(exists, axis=1) > 1
    assert np.all(np.where(started, got.age > 0, got.age == 0))
    segments = jnp.asarray([[0, 0, 0, 1, 2, 2]])
    mask = packed_intervals(segments)
    for given in (mask, mask.dense()):
        age = token_order(given, None, 6).age
        np.testing.assert_array_equal(age, [[0, 1, 2, 0, 0, 1]])


def test_a_rollout_is_what_one_reading_says():
    """Through the cache, two samples a prompt, and in slots."""
    model, mask = make(SHALLOW), jnp.arange(6) >= jnp.array([[0], [4], [2]])
    run = dict(max_new_tokens=8, eos_ids=(7, 9), pad_id=0)
    prompts = Prompts(jnp.where(mask, tokens_of(3, 6), 0), mask)
    out = rollout(model, prompts, KEY, samples=2, **run)
    logits = logits_of(model, out.sequence, out.sequence_mask)
    logp = jax.nn.log_softmax(logits[:, 5:-1])
    want = jnp.take_along_axis(logp, out.tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(
        jnp.where(out.mask, out.logp, 0), jnp.where(out.mask, want, 0),
        atol=1e-4,
    )  # fmt: skip
    held = rollout(model, prompts, KEY, samples=2, slots=2, **run)
    np.testing.assert_array_equal(held.tokens, out.tokens)


def test_layers_apart_keep_each_its_own():
    """Tokens read from a cache in which no two states are the same."""
    model, length, m = make(UNROLLED), 5, 2
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
        model.init_cache(2, length, m),
    ).replace(length=jnp.asarray(3, jnp.int32))
    mask = BranchMask(jnp.ones((2, length), bool), jnp.full((2, m), 2), 3)
    given = tokens_of(2, m), jnp.full((2, m), 3), mask
    want, kept = jax.jit(lambda f, *x: f(*x))(model, *given, cache)
    apart, reader = split_cache(UNROLLED, cache), unstack(model, length)
    got, apart = jax.jit(lambda f, *x: f(*x))(reader, *given, apart)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for i, layer in enumerate([0, 2]):
        for name in ("states", "inputs"):
            one, other = getattr(apart[layer], name), getattr(kept, name)[i]
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_layers_kept_are_those_of_their_kind(tmp_path):
    model = make(RECURRENT)
    kept = drop_layers(model, [0, 1, 3])
    for name, layers in (
        ("delta_o", [0]), ("q", [0, 1]), ("gate", [0, 1, 3])
    ):  # fmt: skip
        np.testing.assert_array_equal(
            kept.arrays[name], model.arrays[name][np.array(layers)]
        )
    with pytest.raises(ValueError, match="all 2 layers are recurrent and at"):
        RECURRENT.keep_layers([0, 2])
    attention = drop_layers(model, [1, 3])
    assert attention.config.recurrent == ()
    assert_same(load(save_model(attention, tmp_path / "m"))[0], attention)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_adapters_and_integers(grouped, tmp_path):
    """Merged, in PEFT's files, and beside int8."""
    config = dataclasses.replace(SHALLOW, delta_grouped=grouped)
    base, tokens = make(config), tokens_of(2, 7)
    model = adapted(base, Lora(2, 4.0, config.lora_targets))
    want = logits_of(model, tokens)
    assert np.abs(want - logits_of(base, tokens)).max() > 0.1
    got = logits_of(merge_lora(model), tokens)
    np.testing.assert_allclose(got, want, atol=1e-3)
    folder = save_adapter(model, tmp_path / "adapter", base="base")
    assert_same(load_adapter(base, folder), model)
    small = quantize(base, "int8")
    want = logits_of(dequantize(small), tokens)
    np.testing.assert_allclose(logits_of(small, tokens), want, atol=1e-3)
