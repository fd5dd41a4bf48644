"""Rotary frequencies and their stretching, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.models import DecoderConfig, RopeScaling
from topd_jax.models.frequencies import frequencies
from topd_jax.models.rope import rope_rows, rope_table

CONFIG = DecoderConfig(
    vocab_size=8, layers=4, width=8, heads=2, kv_heads=1, head_dim=4,
    mlp_width=8, rope_theta=100.0,
)  # fmt: skip


# Four frequencies of theta 1e6, as transformers computes them with torch.
TORCH = [
    "0x1.9c975a0000000p-1", "0x1.4c7bc00000000p-1",
    "0x1.0bedde0000000p-1", "0x1.afd1360000000p-2",
]  # fmt: skip


def test_plain_and_linear():
    # 100 ** (-0 / 4), 100 ** (-2 / 4)
    np.testing.assert_allclose(frequencies(100.0, 4), [1.0, 0.1])
    got = frequencies(100.0, 4, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(got, [0.25, 0.025])


def test_frequencies_round_as_the_reference():
    """To the bit, where exact ones would be turned too far at 32k."""
    got = frequencies(1e6, 128)
    assert got.dtype == np.float32
    assert [float(f).hex() for f in got[1:5]] == TORCH
    exact = (1e6 ** -(np.arange(128 // 2) / 64)).astype(np.float32)
    assert np.abs(exact - got).max() * 32_768 > 1e-3  # rad


def test_yarn_ramps_between_its_borders():
    """Borders: pairs that turn 8 times and once in 64 tokens."""
    scaling = RopeScaling("yarn", 4.0, 64.0, beta_fast=8.0, beta_slow=1.0)
    plain = frequencies(100.0, 8)
    # 8 ln(64 / 16 pi) / (2 ln 100) = 0.21, down to 0; with one turn:
    # 8 ln(64 / 2 pi) / (2 ln 100) = 2.02, up to 3. Ramp 0, 1/3, 2/3, 1.
    keep = 1 - np.array([0, 1 / 3, 2 / 3, 1]) * 3 / 4
    np.testing.assert_allclose(frequencies(100.0, 8, scaling), plain * keep)
    fine = dataclasses.replace(scaling, truncate=False)
    assert not np.allclose(frequencies(100.0, 8, fine), plain * keep)


def test_longrope_divides_each_pair_by_one_list_for_all_rows():
    scaling = RopeScaling(
        "longrope", 8.0, 64.0, attention_factor=1.5,
        short_factors=(1.0, 2.0), long_factors=(4.0, 5.0),
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    for length, factors in ((64, [1, 2]), (65, [4, 5])):
        own = config.for_rows(length)
        assert own.for_rows(0) == own  # not known: as it is
        for position in (3, 100):
            cos, _ = rope_table(jnp.array([[position]]), own)
            angle = position * np.array([1.0, 0.1]) / factors
            np.testing.assert_allclose(
                cos[0, 0, 0, 0], 1.5 * np.cos(angle), rtol=1e-5
            )
    config.for_rows(64).require_rows(64, "stop")
    config.for_rows(65).require_rows(999, "stop")
    CONFIG.require_rows(10**6, "stop")
    with pytest.raises(ValueError, match="65 tokens.*more than 64 .*; stop"):
        config.for_rows(64).require_rows(65, "stop")
    assert CONFIG.for_rows(10**6) == CONFIG
    with pytest.raises(
        ValueError, match="rotary_dim=4 turns 2 pairs.* for 2 and 1"
    ):
        config.replace(
            rope_scaling=dataclasses.replace(scaling, long_factors=(1.0,))
        )
    assert DecoderConfig.from_dict(own.to_dict()) == own


def test_each_layer_is_turned_in_its_own_way():
    config = CONFIG.replace(
        rope_scaling=RopeScaling("yarn", 1.0, 64.0, attention_factor=2.0),
        local_rope_theta=25.0, window=3, sliding=(True, False, True, False),
        no_rope=(False, False, True, False),
    )  # fmt: skip
    np.testing.assert_array_equal(rope_rows(config), [1, 0, 2, 0])
    cos, sin = rope_table(jnp.array([[3]]), config)
    assert cos.shape == (3, 1, 1, 1, 2)
    want = [
        2 * np.cos([3.0, 0.3]),  # yarn's factor of both
        np.cos([3.0, 3 / 5]),  # 25 ** -0.5, never stretched
        [1.0, 1.0],
    ]
    np.testing.assert_allclose(cos[:, 0, 0, 0], want, rtol=1e-5)
    np.testing.assert_allclose(sin[2], 0)
    # What no layer uses is not computed.
    assert rope_table(jnp.array([[3]]), CONFIG)[0].shape[0] == 1
    np.testing.assert_array_equal(rope_rows(CONFIG), [0] * 4)
