"""The draw of one token, its filters, its bounds; random streams."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import topd_jax
from topd_jax.sampling import Stream, samplers, stream_key

ROW = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draw(key, logits, temperature=1.0, top_p=None, top_k=0):
    noise = jax.random.uniform(key, (*logits.shape[:-1], 2))
    return samplers.choose(noise, logits, temperature, top_p, top_k)


draw_jitted = jax.jit(draw, static_argnums=(3, 4))


def test_draw_frequencies_are_the_tempered_softmax():
    size = 300
    logits = jax.random.normal(jax.random.key(size), (size,)) * 1.5
    logits = logits.at[2].set(-jnp.inf)
    n = 30_000
    tokens, logp = draw_jitted(
        jax.random.key(3), jnp.broadcast_to(logits, (n, size)), 0.6
    )
    p = np.asarray(jax.nn.softmax(logits / 0.6))
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
    size, n = 150_001, 1000
    logits = jnp.zeros(size).at[75_000].set(np.log(size - 1))
    keys = jax.random.split(jax.random.key(0), n)
    tokens, _ = jax.lax.map(lambda k: draw(k, logits), keys, batch_size=100)
    others = np.asarray(tokens)[np.asarray(tokens) != 75_000]
    assert abs(len(others) - n / 2) < 5 * np.sqrt(n / 4)
    low = (others < size // 2).sum()
    assert abs(low - len(others) / 2) < 5 * np.sqrt(len(others) / 4)
    assert len(np.unique(others)) > 0.98 * len(others)


@pytest.mark.parametrize(
    ("logits", "top_p", "top_k", "kept"),
    [
        (ROW, 0.6, 0, [1, 3]),  # 0.4 does not reach 0.6, 0.7 does
        (ROW, 0.75, 3, [1, 3]),  # of what top_k left: 0.444, 0.778
        (ROW, 1e-6, 0, [1]),
        # Ties are broken by id.
        (np.log(np.full(6, 1 / 6)), None, 2, [0, 1]),
        (np.log(np.full(6, 1 / 6)), 0.4, 0, [0, 1, 2]),
    ],
)
def test_filters_by_hand(logits, top_p, top_k, kept):
    tokens, logp = draw_jitted(
        jax.random.key(0), jnp.tile(logits, (4000, 1)), 1.0, top_p, top_k
    )
    assert set(np.unique(tokens)) == set(kept)
    p = np.exp(logits)
    expected = np.log(p[tokens] / p[kept].sum())
    np.testing.assert_allclose(logp, expected, atol=1e-6)
    for token in kept:
        share = np.mean(np.asarray(tokens) == token)
        assert abs(share - p[token] / p[kept].sum()) < 0.04


@pytest.mark.parametrize("size", [256, 257])
def test_zero_temperature_takes_the_first_of_the_likeliest(size):
    """Whatever blocks a vocabulary is read in; the last id too."""
    key = jax.random.key(size)
    logits = jax.random.randint(key, (64, size), -3, 4).astype(jnp.float32)
    logits = jnp.where(logits == -3, -jnp.inf, logits)  # ties, and no hope
    logits = logits.at[0].set(-jnp.inf).at[1, size - 1].set(9.0)
    for zero in (0, jnp.float32(0)):
        tokens, logp = draw(key, logits, zero, 0.9, 3)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
        np.testing.assert_array_equal(logp, np.zeros(64))


def test_sums_that_err_draw_nothing_without_weight(monkeypatch):
    """As sums made in parallel may: the second is 1e-4 too large."""
    sums = jnp.array([0.5, 0.5001, 1.0])
    monkeypatch.setattr(jnp, "cumsum", lambda weights, axis: sums)
    weights = jnp.array([0.5, 0.0, 0.5])
    assert samplers._invert_once(jnp.float32(0.50005), weights) == 2


def test_draw_survives_rows_without_hope():
    logits = jnp.stack([jnp.full(300, -jnp.inf), jnp.full(300, jnp.nan)])
    for temperature in (0.0, 1.0):
        tokens, _ = draw_jitted(jax.random.key(0), logits, temperature)
        assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(temperature=-1.0), "temperature=-1.0 must lie in 0 \\(greedy\\)"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1e308), "temperature=1e\\+308.*1000"),
        (dict(top_p=0.0), "top_p=0.0.*above 0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(top_k=-2), "top_k=-2"),
        (dict(top_k=5), "top_k=5.*vocabulary, 4"),
        (dict(top_k=1.0), "top_k=1.0 must be an int"),
    ],
)
def test_settings_of_a_sampler_are_bounded(setting, words):
    with pytest.raises(ValueError, match=words):
        samplers.check_sampler(vocab_size=4, **setting)


def test_every_stream_has_random_numbers_of_its_own():
    keys = [stream_key(jax.random.key(0), stream) for stream in Stream]
    draws = {float(jax.random.uniform(key)) for key in keys}
    assert len(draws) == len(Stream.__members__) > 1
    assert min(Stream) > 10**9, "no training step has such a number"


def test_no_module_has_a_stream_that_is_not_listed():
    package = Path(topd_jax.__file__).parent
    own = package / "sampling" / "streams.py"
    modules = {p: p.read_text() for p in package.rglob("*.py") if p != own}
    assert [p.name for p, text in modules.items() if "2**31" in text] == []
    uses = [s.name for s in Stream for t in modules.values()
            if f"Stream.{s.name}" in t]  # fmt: skip
    assert sorted(uses) == sorted(s.name for s in Stream)
