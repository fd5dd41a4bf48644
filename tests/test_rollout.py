"""Rollouts: what is written, when they stop, what repeats and what differs."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import on_eight_devices
from flax import struct

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import causal_mask, init_decoder, unembed
from topd_jax.sampling import rollout
from topd_jax.types import Prompts, completion_states

rollout_module = sys.modules[rollout.__module__]

CONFIG = DecoderConfig(
    vocab_size=41, layers=2, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24,
)  # fmt: skip


@struct.dataclass
class BigramCache:
    columns: jax.Array  # [1, B, L]
    length: jax.Array


@struct.dataclass
class Bigram:
    """The next token depends on the last one only; counts its calls."""

    table: jax.Array  # f32[V, V] logits
    calls: list = struct.field(pytree_node=False, default=None)

    @property
    def head(self) -> jax.Array:
        return jnp.eye(self.table.shape[0])

    def init_cache(self, batch: int, columns: int) -> BigramCache:
        zeros = jnp.zeros((1, batch, columns))
        return BigramCache(zeros, jnp.zeros((), jnp.int32))

    def __call__(self, tokens, positions, mask, cache=None):
        assert mask.shape[-1] == cache.columns.shape[-1]
        if self.calls is not None:
            shape = tokens.shape
            jax.debug.callback(lambda _: self.calls.append(shape), tokens[0, 0])
        cache = cache.replace(length=cache.length + tokens.shape[1])
        return self.table[tokens], cache


class Tape(list):
    """A list that a pytree may carry as static data."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture(scope="module")
def model():
    return jax.jit(init_decoder, static_argnums=0)(CONFIG, jax.random.key(0))


def chain(size: int, **arrows: int) -> jax.Array:
    """Logits of a certain bigram: ``t3=5`` puts 5 after 3; else stays."""
    after = np.arange(size)
    for name, to in arrows.items():
        after[int(name[1:])] = to
    return jnp.where(jnp.arange(size) == after[:, None], 0.0, -200.0)


def some_prompts(lengths=(3, 5, 1, 4), width=5, seed=1) -> Prompts:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG.vocab_size, (len(lengths), width))
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return Prompts(
        jnp.asarray(np.where(mask, tokens, 0), jnp.int32), jnp.asarray(mask)
    )


def one(*tokens: int) -> Prompts:
    return Prompts(jnp.array([tokens]), jnp.ones((1, len(tokens)), bool))


@jax.jit
def read(model, out):
    """Raw logits that a full forward pass gives each completion token."""
    mask = causal_mask(out.sequence_mask)
    hidden, _ = model(out.sequence, out.positions, mask)
    hidden = completion_states(hidden, out.prompt.shape[1])
    return unembed(model.head, hidden)


def test_end_is_counted_and_nothing_after_it():
    bigram = Bigram(chain(9, t1=2, t2=3, t3=4, t4=5, t5=1, t6=7, t7=8))
    prompts = Prompts(
        jnp.array([[0, 1], [1, 2], [3, 6]]), jnp.ones((3, 2), bool)
    )
    out = rollout(
        bigram, prompts, jax.random.key(0), max_new_tokens=4, eos_ids=(4, 8),
        pad_id=0, buckets=(),
    )  # fmt: skip
    np.testing.assert_array_equal(
        out.tokens, [[2, 3, 4, 0], [3, 4, 0, 0], [7, 8, 0, 0]]
    )
    np.testing.assert_array_equal(
        out.mask, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(out.truncated, [False] * 3)
    np.testing.assert_array_equal(out.logp, np.zeros((3, 4)))


def test_pad_may_be_the_end_and_no_end_never_stops():
    bigram = Bigram(chain(4, t1=2, t2=3, t3=1))
    run = dict(max_new_tokens=5, pad_id=3, buckets=())
    out = rollout(bigram, one(3, 1), jax.random.key(0), eos_ids=[3], **run)
    np.testing.assert_array_equal(out.tokens, [[2, 3, 3, 3, 3]])
    np.testing.assert_array_equal(out.mask, [[1, 1, 0, 0, 0]])
    out = rollout(bigram, one(3, 1), jax.random.key(0), eos_ids=(), **run)
    np.testing.assert_array_equal(out.tokens, [[2, 3, 1, 2, 3]])
    assert out.mask.all()
    assert out.truncated.all()


def test_truncated_only_without_an_end():
    bigram = Bigram(chain(5, t1=2, t2=3, t3=4))
    run = dict(eos_ids=(3,), pad_id=0, buckets=())
    out = rollout(bigram, one(1), jax.random.key(0), max_new_tokens=1, **run)
    assert out.truncated[0]
    assert out.mask.all()
    # The end as the last token that fits is an end.
    out = rollout(bigram, one(1), jax.random.key(0), max_new_tokens=2, **run)
    assert not out.truncated[0]
    assert out.mask.all()


def test_stops_when_every_row_has_ended():
    calls = Tape()
    bigram = Bigram(chain(9, t1=2, t2=3, t3=4), calls)
    prompts = Prompts(jnp.array([[1], [2]]), jnp.ones((2, 1), bool))
    out = rollout(
        bigram, prompts, jax.random.key(0), max_new_tokens=500, eos_ids=(4,),
        pad_id=0, buckets=(), samples=2,
    )  # fmt: skip
    jax.block_until_ready(out)
    jax.effects_barrier()
    # One prefill of 2 prompts; 3 tokens in 4 rows: the last is never read.
    assert list(calls) == [(2, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_is_the_models_own(model, temperature):
    prompts = some_prompts()
    out = rollout(
        model, prompts, jax.random.key(4), max_new_tokens=12, eos_ids=(7, 9),
        pad_id=0, temperature=temperature,
    )  # fmt: skip
    assert out.prompt.shape == (4, 8)
    np.testing.assert_array_equal(out.prompt[:, 3:], prompts.tokens)
    assert not out.prompt_mask[:, :3].any()
    logits = read(model, out) / temperature
    logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits), out.tokens[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(
        out.logp, jnp.where(out.mask, logp, 0), atol=1e-4
    )
    assert (out.logp[out.mask] < 0).all()


def test_transitions_follow_the_tempered_softmax():
    table = jax.random.normal(jax.random.key(0), (6, 6)) * 2
    out = rollout(
        Bigram(table), one(1), jax.random.key(0), max_new_tokens=20,
        eos_ids=(), pad_id=0, samples=2000, temperature=0.7,
    )  # fmt: skip
    p = np.asarray(jax.nn.softmax(table / 0.7))
    before = np.asarray(out.sequence[:, out.prompt.shape[1] - 1 : -1])
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (before, np.asarray(out.tokens)), 1)
    seen = pairs.sum(1, keepdims=True)
    deviation = np.sqrt(p * (1 - p) / seen)
    assert (np.abs(pairs / seen - p) < 5 * deviation + 1e-4).all()


def test_greedy_follows_the_argmax_of_a_full_forward(model):
    out = rollout(
        model, some_prompts(), jax.random.key(4), max_new_tokens=9,
        eos_ids=(), pad_id=0, temperature=0.0,
    )  # fmt: skip
    best = read(model, out).argmax(-1)
    np.testing.assert_array_equal(out.tokens, best)


def test_padding_and_rows_do_not_change_a_rollout(model):
    run = dict(max_new_tokens=6, eos_ids=(7,), pad_id=0)
    wide = rollout(model, some_prompts(), jax.random.key(1), **run)
    for row, size in [(0, 3), (2, 1)]:
        prompts = some_prompts()
        cut = Prompts(
            prompts.tokens[: row + 1, -size:], prompts.mask[: row + 1, -size:]
        )
        out = rollout(model, cut, jax.random.key(1), buckets=(), **run)
        np.testing.assert_array_equal(out.tokens[row], wide.tokens[row])
        np.testing.assert_allclose(out.logp[row], wide.logp[row], atol=1e-5)


def test_fewer_steps_are_a_prefix(model):
    run = dict(eos_ids=(7,), pad_id=0)
    key = jax.random.key(1)
    long = rollout(model, some_prompts(), key, max_new_tokens=9, **run)
    short = rollout(model, some_prompts(), key, max_new_tokens=4, **run)
    np.testing.assert_array_equal(long.tokens[:, :4], short.tokens)


def test_samples_are_consecutive_rows_with_noise_of_their_own(model):
    run = dict(max_new_tokens=8, eos_ids=(), pad_id=0)
    key = jax.random.key(2)
    prompts = some_prompts()
    out = rollout(model, prompts, key, samples=3, **run)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts)
    same = rollout(model, repeated, key, **run)
    np.testing.assert_array_equal(out.prompt, same.prompt)
    np.testing.assert_array_equal(out.tokens, same.tokens)
    np.testing.assert_allclose(out.logp, same.logp, atol=1e-5)
    assert len(np.unique(np.asarray(out.tokens), axis=0)) == 12


def test_keys_repeat_and_differ(model):
    run = dict(max_new_tokens=8, eos_ids=(), pad_id=0)
    a, b, c = (
        np.asarray(
            rollout(model, some_prompts(), jax.random.key(k), **run).tokens
        )
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5
    # Steps differ too: from one state, not one token for ever.
    flat = Bigram(jnp.zeros((50, 50)))
    out = rollout(flat, one(1), jax.random.key(0), max_new_tokens=40,
                  eos_ids=(), pad_id=0)  # fmt: skip
    assert len(np.unique(out.tokens)) > 15


def test_vocab_size_hides_padded_ids():
    flat = Bigram(jnp.zeros((64, 64)).at[:, 60:].set(5.0))
    run = dict(max_new_tokens=99, eos_ids=(), pad_id=0, vocab_size=60)
    for temperature in (0.0, 1.0):
        out = rollout(
            flat, one(1), jax.random.key(0), temperature=temperature, **run
        )
        assert (out.tokens < 60).all()


def test_settings_do_not_recompile(model):
    compiled = rollout_module._rollout._cache_size
    run = dict(max_new_tokens=3, eos_ids=(7,), pad_id=0)
    key = jax.random.key
    rollout(model, some_prompts(), key(0), temperature=1.0, **run)
    before = compiled()
    for temperature in (0.3, 0.0, 2, jnp.float32(0.9)):
        rollout(model, some_prompts(), key(1), temperature=temperature, **run)
    for lengths, width in (((2, 1, 1, 2), 2), ((7, 8, 1, 1), 8)):
        rollout(model, some_prompts(lengths, width), key(2), **run)
    assert compiled() == before
    rollout(model, some_prompts(), key(0), top_p=0.5, **run)
    assert compiled() == before + 1
    rollout(model, some_prompts(), key(0), top_p=0.9, **run)
    assert compiled() == before + 1


def test_inside_another_jit(model):
    run = dict(max_new_tokens=5, eos_ids=(7,), pad_id=0)

    @jax.jit
    def outer(model, prompts, key, temperature):
        return rollout(model, prompts, key, temperature=temperature, **run)

    args = (model, some_prompts(), jax.random.key(0))
    inside = outer(*args, 0.8)
    alone = rollout(*args, temperature=0.8, **run)
    np.testing.assert_array_equal(inside.tokens, alone.tokens)
    np.testing.assert_allclose(inside.logp, alone.logp, atol=1e-5)


def test_bfloat16_and_scanned_layers_roll_out():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", unroll=2)
    out = rollout(
        init_decoder(config, jax.random.key(0)), some_prompts(),
        jax.random.key(0), max_new_tokens=5, eos_ids=(), pad_id=0,
    )  # fmt: skip
    assert out.logp.dtype == jnp.float32
    assert np.isfinite(out.logp).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(samples=0), "samples=0"),
        (dict(eos_ids=7), "sequence: \\(7,\\)"),
        (dict(eos_ids=(3, 41)), "eos_ids: 41 must lie in 0..40"),
        (dict(pad_id=-1), "pad_id: -1"),
        (dict(top_k=42), "top_k=42.*41"),
        (dict(buckets=(4,)), "5 tokens exceed"),
        (dict(sharding="columns"), "'columns' must be one of train, gathered"),
    ],
)
def test_rollout_refuses_settings(model, setting, words):
    run = dict(max_new_tokens=3, eos_ids=(7,), pad_id=0) | setting
    with pytest.raises(ValueError, match=words):
        rollout(model, some_prompts(), jax.random.key(0), **run)
    bad = Prompts(jnp.zeros((2, 3), jnp.int32), jnp.ones((3,), bool))
    with pytest.raises(ValueError, match="one shape"):
        rollout(
            model, bad, jax.random.key(0), max_new_tokens=1, eos_ids=(),
            pad_id=0,
        )  # fmt: skip


@pytest.mark.slow
def test_eight_devices_equal_one():
    assert "equal" in on_eight_devices("sharded_rollout.py")
