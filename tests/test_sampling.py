"""Sampler settings, the draw itself, and prompt buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.sampling import bucket, draw, pad_prompts
from topd_jax.types import Prompts

ROW = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
PROMPT = Prompts(jnp.array([[7, 8]]), jnp.ones((1, 2), bool))


@pytest.mark.parametrize("size", [5, 300, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draw_frequencies_are_the_tempered_softmax(size, temperature):
    logits = jax.random.normal(jax.random.key(size), (size,)) * 1.5
    logits = logits.at[2].set(-jnp.inf)
    n = 100_000
    tokens, logp = jax.jit(draw)(
        jax.random.key(3), jnp.broadcast_to(logits, (n, size)), temperature
    )
    p = np.asarray(jax.nn.softmax(logits / temperature))
    count = np.bincount(np.asarray(tokens), minlength=size)
    assert count[2] == 0
    # Pearson's statistic has mean and half variance df; six deviations.
    expected = p * n
    big = expected > 5
    rest = np.array([[count[~big].sum(), expected[~big].sum()]])
    pairs = np.concatenate([np.stack([count, expected], 1)[big], rest])
    pairs = pairs[pairs[:, 1] > 5]
    chi = ((pairs[:, 0] - pairs[:, 1]) ** 2 / pairs[:, 1]).sum()
    df = len(pairs) - 1
    assert abs(chi - df) < 6 * np.sqrt(2 * df), (chi, df)
    np.testing.assert_allclose(logp, np.log(p[tokens]), atol=2e-5)


def test_rare_tokens_of_a_large_vocabulary_keep_their_odds():
    # Half the mass is one token; 150,000 others share the rest, 3e-6 each.
    size, n = 150_001, 2000
    logits = jnp.zeros(size).at[75_000].set(np.log(size - 1))
    keys = jax.random.split(jax.random.key(0), n)
    tokens, _ = jax.lax.map(lambda k: draw(k, logits), keys, batch_size=100)
    tokens = np.asarray(tokens)
    others = tokens[tokens != 75_000]
    assert abs(len(others) - n / 2) < 5 * np.sqrt(n / 4)
    low = (others < size // 2).sum()
    assert abs(low - len(others) / 2) < 5 * np.sqrt(len(others) / 4)
    assert len(np.unique(others)) > 0.98 * len(others)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 2, [1, 3]),
        (0.6, 0, [1, 3]),  # 0.4 does not reach 0.6, 0.7 does
        (0.39, 0, [1]),
        (0.75, 0, [1, 3, 2]),
        (0.75, 3, [1, 3]),  # of what top_k left: 0.444, 0.778
        (1e-6, 0, [1]),
        (1.0, 4, [0, 1, 2, 3]),
    ],
)
def test_filters_by_hand(top_p, top_k, kept):
    tokens, logp = draw(
        jax.random.key(0), jnp.tile(ROW, (4000, 1)), 1.0, top_p, top_k
    )
    assert set(np.unique(tokens)) == set(kept)
    p = np.exp(ROW)
    expected = np.log(p[tokens] / p[kept].sum())
    np.testing.assert_allclose(logp, expected, atol=1e-6)
    for token in kept:
        share = np.mean(np.asarray(tokens) == token)
        assert abs(share - p[token] / p[kept].sum()) < 0.04


def test_filters_break_ties_by_id():
    tokens, logp = draw(jax.random.key(0), jnp.zeros((500, 6)), top_k=2)
    assert set(np.unique(tokens)) == {0, 1}
    np.testing.assert_allclose(logp, np.log(0.5), atol=1e-6)
    tokens, _ = draw(jax.random.key(0), jnp.zeros((500, 6)), top_p=0.4)
    assert set(np.unique(tokens)) == {0, 1, 2}


def test_zero_temperature_is_greedy_with_certainty():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [-jnp.inf, -jnp.inf, 3.0, 3.0]])
    for setting in (0.0, 0, jnp.float32(0)):
        tokens, logp = draw(jax.random.key(0), logits, setting, 0.9, 3)
        np.testing.assert_array_equal(tokens, [1, 2])
        np.testing.assert_array_equal(logp, [0.0, 0.0])


def test_draw_survives_rows_without_hope():
    logits = jnp.stack([jnp.full(300, -jnp.inf), jnp.full(300, jnp.nan)])
    for temperature in (0.0, 1.0):
        tokens, _ = draw(jax.random.key(0), logits, temperature)
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_draw_jitted_equals_eager():
    logits = jax.random.normal(jax.random.key(1), (7, 300))
    for top_p, top_k in ((1.0, 0), (0.8, 0), (0.8, 20)):
        eager = draw(jax.random.key(2), logits, 0.7, top_p, top_k)
        traced = jax.jit(draw, static_argnums=(3, 4))(
            jax.random.key(2), logits, 0.7, top_p, top_k
        )
        np.testing.assert_array_equal(eager[0], traced[0])
        np.testing.assert_allclose(eager[1], traced[1], atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(temperature=-1.0), "temperature=-1.0.*0 \\(greedy\\)"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0.0), "top_p=0.0.*above 0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(top_k=-2), "top_k=-2"),
        (dict(top_k=5), "top_k=5.*vocabulary, 4"),
        (dict(top_k=1.0), "top_k=1.0 must be an int"),
    ],
)
def test_draw_refuses_settings(setting, words):
    with pytest.raises(ValueError, match=words):
        draw(jax.random.key(0), jnp.asarray(ROW), **setting)


def test_buckets():
    widths = [bucket(n) for n in (1, 8, 9, 16, 17, 25, 33, 49, 65, 97, 800)]
    assert widths == [8, 8, 16, 16, 24, 32, 48, 64, 96, 128, 1024]
    assert bucket(5, (4, 12, 8)) == 8
    with pytest.raises(ValueError, match=r"13 tokens exceed .* \(12\)"):
        bucket(13, (4, 12, 8))


def test_pad_prompts_goes_left():
    padded = pad_prompts(PROMPT, 4, 3)
    np.testing.assert_array_equal(padded.tokens, [[3, 3, 7, 8]])
    np.testing.assert_array_equal(padded.mask, [[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="width=1"):
        pad_prompts(PROMPT, 1, 3)
