"""Branches: the teacher's own continuations on the cache it has."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import causal_mask, init_decoder, unembed
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.types import (
    Candidates,
    Prompts,
    Trajectories,
    completion_states,
    positions_of,
)

CONFIG = DecoderConfig(
    vocab_size=23, layers=2, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24,
)  # fmt: skip
K = 6
# Ids 3 to 5 end: with 23 ids about half of the windows below are cut short.
IDS = dict(eos_ids=(3, 4, 5), pad_id=0)


@pytest.fixture(scope="module")
def model():
    return init_decoder(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def written(model) -> Trajectories:
    """Rows with padding on both sides; the last one ends early."""
    rng = np.random.default_rng(0)
    prompt = np.arange(5) >= 5 - np.array([3, 5, 1, 4])[:, None]
    lengths = np.array([9, 7, 9, 2])[:, None]
    mask = np.arange(9) < lengths
    tokens = rng.integers(6, 23, (4, 9))
    tokens[np.arange(9) == lengths - 1] = 3
    return Trajectories(
        prompt=jnp.asarray(np.where(prompt, rng.integers(6, 23, (4, 5)), 0)),
        prompt_mask=jnp.asarray(prompt),
        tokens=jnp.asarray(np.where(mask, tokens, 0)),
        mask=jnp.asarray(mask),
        logp=jnp.zeros((4, 9)),
        truncated=jnp.zeros(4, bool),
    )


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return Candidates(
        jnp.array([[0, 3, 8], [1, 2, 6], [0, 4, 5], [1, 0, 0]]),
        jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool),
    )


@functools.partial(jax.jit, static_argnames="extra")
def read(model, written, extra):
    """The model's cache and states over the trajectories."""
    rows, columns = written.sequence.shape
    mask = causal_mask(written.sequence_mask)
    hidden, cache = model(
        written.sequence,
        written.positions,
        jnp.pad(mask, ((0, 0), (0, 0), (0, extra))),
        model.init_cache(rows, columns + extra),
    )
    return cache, completion_states(hidden, written.prompt.shape[1])


def look_ahead(model, written, candidates, length=K, **settings):
    extra = branch_columns(candidates.positions.shape[1], length)
    cache, hidden = read(model, written, extra)
    return branch(
        model, cache, hidden, written, candidates, length=length,
        **(IDS | settings),
    )  # fmt: skip


def prefixes(written: Trajectories, candidates: Candidates) -> Prompts:
    """Every prompt + y_{<t} as a prompt of its own, [B * M] rows."""
    tokens, mask = [], []
    sequence = np.asarray(written.sequence)
    exists = np.asarray(written.sequence_mask)
    columns = sequence.shape[1]
    for row, positions in enumerate(np.asarray(candidates.positions)):
        for t in positions:
            end = written.prompt.shape[1] + t
            have = sequence[row, :end][exists[row, :end]]
            pad = columns - len(have)
            tokens.append(np.r_[np.zeros(pad, int), have])
            mask.append(np.arange(columns) >= pad)
    return Prompts(jnp.asarray(np.stack(tokens)), jnp.asarray(np.stack(mask)))


def test_branch_equals_re_prefill(model, written, candidates):
    windows, states = look_ahead(model, written, candidates, return_hidden=True)
    alone = rollout(
        model, prefixes(written, candidates), jax.random.key(0),
        max_new_tokens=K, temperature=0.0, **IDS,
    )  # fmt: skip
    used = np.asarray(candidates.mask)
    mask = np.asarray(alone.mask).reshape(4, 3, K) & used[..., None]
    tokens = np.where(mask, np.asarray(alone.tokens).reshape(4, 3, K), 0)
    np.testing.assert_array_equal(windows.mask, mask)
    np.testing.assert_array_equal(windows.tokens, tokens)
    lengths = mask.sum(-1)[used]
    assert 1 < lengths.min() < K == lengths.max(), "tests both kinds of ends"

    hidden, _ = model(
        alone.sequence, positions_of(alone.sequence_mask),
        causal_mask(alone.sequence_mask),
    )  # fmt: skip
    hidden = completion_states(hidden, alone.prompt.shape[1])
    hidden = np.where(mask[..., None], hidden.reshape(4, 3, K, -1), 0)
    np.testing.assert_allclose(states, hidden, atol=1e-5)


def test_branches_do_not_see_each_other(model, written, candidates):
    together = look_ahead(model, written, candidates)
    for slot in range(3):
        single = jax.tree.map(lambda x: x[:, slot : slot + 1], candidates)  # noqa: B023
        alone = look_ahead(model, written, single)
        np.testing.assert_array_equal(
            alone.tokens[:, 0], together.tokens[:, slot]
        )
        np.testing.assert_array_equal(alone.mask[:, 0], together.mask[:, slot])


def test_what_comes_after_the_candidate_does_not_matter(
    model, written, candidates
):
    single = Candidates(jnp.full((4, 1), 1), jnp.ones((4, 1), bool))
    other = written.replace(tokens=written.tokens.at[:, 1:].set(11))
    np.testing.assert_array_equal(
        look_ahead(model, written, single).tokens,
        look_ahead(model, other, single).tokens,
    )


def test_jitted_equals_eager(model, written, candidates, monkeypatch):
    jitted = look_ahead(model, written, candidates)
    module = sys.modules[branch.__module__]
    monkeypatch.setattr(module, "_branch", module._branch.__wrapped__)
    eager = look_ahead(model, written, candidates)
    np.testing.assert_array_equal(jitted.tokens, eager.tokens)
    np.testing.assert_array_equal(jitted.mask, eager.mask)


def test_no_candidate_at_all(model, written, candidates):
    none = candidates.replace(mask=jnp.zeros((4, 3), bool))
    windows, states = look_ahead(model, written, none, return_hidden=True)
    assert not windows.mask.any()
    np.testing.assert_array_equal(windows.tokens, 0)
    np.testing.assert_array_equal(states, 0)


def test_one_token_needs_no_column(model, written, candidates):
    assert branch_columns(3, 1) == 0
    assert branch_columns(3, K) == 15
    first = look_ahead(model, written, candidates, length=1)
    long = look_ahead(model, written, candidates)
    np.testing.assert_array_equal(first.tokens, long.tokens[..., :1])


def test_sampled_windows_follow_the_key(model, written, candidates):
    free = dict(eos_ids=(), temperature=1.0)
    a, b, c = (
        look_ahead(model, written, candidates, key=jax.random.key(k), **free)
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)
    used = np.asarray(candidates.mask)
    assert (np.asarray(a.tokens) != np.asarray(c.tokens))[used].mean() > 0.5
    # Slots of one row draw noise of their own, though they share a prefix.
    same = Candidates(jnp.full((4, 8), 1), jnp.ones((4, 8), bool))
    windows = look_ahead(model, written, same, key=jax.random.key(3), **free)
    for row in np.asarray(windows.tokens):
        assert len(np.unique(row, axis=0)) == 8


def test_first_tokens_follow_the_models_distribution(model, written):
    same = Candidates(jnp.full((4, 4000), 2), jnp.ones((4, 4000), bool))
    windows = look_ahead(
        model, written, same, length=1, temperature=0.8,
        key=jax.random.key(0), vocab_size=20,
    )  # fmt: skip
    _, hidden = read(model, written, 0)
    logits = unembed(model.head, hidden[:, 2])[:, :20]
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    for row, tokens in enumerate(np.asarray(windows.tokens)[..., 0]):
        share = np.bincount(tokens, minlength=20) / 4000
        assert len(share) == 20, "vocab_size hides the rest"
        deviation = np.sqrt(p[row] * (1 - p[row]) / 4000)
        assert (np.abs(share - p[row]) < 5 * deviation + 1e-4).all()


def test_work_grows_with_branches_and_not_with_their_square(model, written):
    def flops(count):
        some = Candidates(
            jnp.ones((4, count), jnp.int32), jnp.ones((4, count), bool)
        )
        cache, hidden = jax.eval_shape(
            lambda: read(model, written, branch_columns(count, 20))
        )
        program = jax.jit(functools.partial(branch, length=20, **IDS))
        compiled = program.lower(model, cache, hidden, written, some).compile()
        return compiled.cost_analysis()["flops"]

    # Were each compared with the columns of all: 3.8.
    assert flops(64) < 2.1 * flops(32)


def test_branch_refuses(model, written, candidates):
    with pytest.raises(ValueError, match="needs a key"):
        look_ahead(model, written, candidates, temperature=0.5)
    cache, hidden = read(model, written, 7)
    run = dict(length=K) | IDS
    with pytest.raises(ValueError, match=r"branch_columns\(3, 6\)\), 29 col"):
        branch(model, cache, hidden, written, candidates, **run)
    cache, hidden = read(model, written, 15)
    with pytest.raises(ValueError, match="completion coordinates"):
        branch(model, cache, hidden[:, 1:], written, candidates, **run)
    flat = jax.tree.map(lambda x: x[0], candidates)
    with pytest.raises(ValueError, match=r"\[B=4, M\]"):
        branch(model, cache, hidden, written, flat, **run)
    run["length"] = 0
    with pytest.raises(ValueError, match="length=0"):
        branch(model, cache, hidden, written, candidates, **run)
