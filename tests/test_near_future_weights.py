"""Weights of the token loss made from the near future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses.divergences import weighted_mean
from topd_jax.losses.near_future import median_cap_weights, n_step_weights
from topd_jax.types import Candidates

B, T, M = 3, 12, 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def row_mask(*lengths, columns=T):
    return jnp.arange(columns) < jnp.array(lengths)[:, None]


def candidates(*rows, slots=M):
    """Candidates at the given positions, one tuple a row."""
    positions = np.zeros((len(rows), slots), int)
    mask = np.zeros((len(rows), slots), bool)
    for i, row in enumerate(rows):
        positions[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Candidates(jnp.asarray(positions), jnp.asarray(mask))


def test_median_cap_weights_by_hand():
    loss = jnp.array([[4.0, 1.0, 2.0, 8.0, 3.0, 100.0]])
    mask = row_mask(5, columns=6)
    selected = jnp.array([[True, True, False, True, False, True]])
    weights = median_cap_weights(loss, mask, selected)
    # The median is 3: 4 and 8 come down to it, 1 is below it already.
    np.testing.assert_allclose(weights, [[0.75, 1, 1, 0.375, 1, 1]])
    np.testing.assert_allclose(
        weighted_mean(loss, weights, mask), (3 + 1 + 2 + 3 + 3) / 5
    )


def test_median_cap_weights_even_row_and_masked_equals_sliced(rng):
    loss = jnp.asarray(rng.exponential(size=(6, T)), jnp.float32)
    selected = jnp.asarray(rng.uniform(size=(6, T)) < 0.5)
    whole = median_cap_weights(loss, row_mask(*[8] * 6), selected)
    sliced = median_cap_weights(
        loss[:, :8], jnp.ones((6, 8), bool), selected[:, :8]
    )
    np.testing.assert_array_equal(whole[:, :8], sliced)
    median = np.median(loss[:, :8], axis=-1, keepdims=True)
    capped = np.minimum(loss[:, :8], median)
    expected = np.where(selected[:, :8], capped, loss[:, :8])
    np.testing.assert_allclose(sliced * loss[:, :8], expected, rtol=1e-5)
    jitted = jax.jit(median_cap_weights)
    np.testing.assert_allclose(
        whole, jitted(loss, row_mask(*[8] * 6), selected), rtol=1e-6
    )


def test_median_cap_weights_keep_a_gradient_but_are_not_differentiated():
    loss = jnp.array([[1.0, 2.0, 8.0]])
    mask = jnp.ones((1, 3), bool)
    only_last = jnp.array([[False, False, True]])

    def total(loss):
        return (median_cap_weights(loss, mask, only_last) * loss).sum()

    np.testing.assert_allclose(jax.grad(total)(loss), [[1, 1, 0.25]])


def test_median_cap_weights_at_the_edges():
    loss = jnp.array(
        [
            [jnp.nan, jnp.inf, 5.0],  # an empty row
            [0.0, 0.0, 2.0],  # median 0
            [jnp.inf, 1.0, 2.0],
            [-1e-8, -1e-8, 1e-8],
        ]
    )
    mask = row_mask(0, 3, 3, 3, columns=3)
    everything = jnp.ones_like(mask)
    weights = median_cap_weights(loss, mask, everything)
    expected = [[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]]
    np.testing.assert_array_equal(weights, expected)


def test_n_step_weights_by_hand():
    mask = row_mask(7, 3, columns=8)
    at = candidates((1, 3), (2,), slots=2)
    divergent = jnp.array([[True, True], [True, True]])
    weights = n_step_weights(
        divergent, at, mask, n=3, discount=0.5, strength=2.0, cap=1.2
    )
    # Bonuses 1, .5, .25 from 1 and from 3; 1.25 at 3 is capped at 1.2.
    expected = [[1, 3, 2, 3.4, 2, 1.5, 1, 0], [1, 1, 3, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_n_step_weights_undiscounted_overlap():
    at = candidates((0, 1, 2), slots=3)
    yes = jnp.ones((1, 3), bool)
    mask = row_mask(6, columns=6)
    weights = n_step_weights(yes, at, mask, n=2, cap=9.0)
    np.testing.assert_allclose(weights, [[2, 3, 3, 2, 1, 1]])
    capped = n_step_weights(yes, at, mask, n=2)
    np.testing.assert_allclose(capped, [[2, 2, 2, 2, 1, 1]])
    # With discount 0 the divergent token alone.
    alone = n_step_weights(yes, at, mask, n=4, discount=0.0)
    np.testing.assert_allclose(alone, [[2, 2, 2, 1, 1, 1]])


def test_n_step_weights_without_divergence_is_the_mask():
    mask = row_mask(4, 0, T)
    none = jnp.zeros((B, M), bool)
    at = candidates((1,), (), (0, 5))
    np.testing.assert_array_equal(n_step_weights(none, at, mask, n=5), mask)


def test_n_step_weights_jit_and_vmap(rng):
    at = Candidates(
        jnp.asarray(rng.integers(0, T, (2, B, M))),
        jnp.asarray(rng.uniform(size=(2, B, M)) < 0.7),
    )
    divergent = jnp.asarray(rng.uniform(size=(2, B, M)) < 0.7)
    mask = jnp.broadcast_to(row_mask(3, 9, T), (2, B, T))

    def weights(divergent, at, mask):
        return n_step_weights(divergent, at, mask, n=4, discount=0.9)

    whole = weights(divergent, at, mask)
    for other in (jax.jit(weights), jax.vmap(weights)):
        np.testing.assert_allclose(whole, other(divergent, at, mask), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": 2, "discount": 1.1}, r"discount=1\.1 must lie in 0\.\.1"),
        ({"n": 2, "strength": -1.0}, r"strength=-1\.0"),
        ({"n": 2, "cap": -1.0}, r"cap=-1\.0"),
    ],
)
def test_n_step_weights_bad_options(options, message):
    yes = jnp.ones((1, M), bool)
    with pytest.raises(ValueError, match=message):
        n_step_weights(yes, candidates((1,)), row_mask(T), **options)
