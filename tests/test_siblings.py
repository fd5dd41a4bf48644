"""Sibling methods' weights and losses, each by hand and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses.divergences import weighted_mean
from topd_jax.losses.siblings import (
    agreement_threshold,
    agreement_weights,
    entropy_aware_loss,
    fire_weights,
    prefix_weights,
    teachability_weights,
    tip_weights,
    top_k_coverage,
    top_k_forward_kl,
    trust_region_loss,
)

B, T = 3, 10


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def row_mask(*lengths, columns=T):
    return jnp.arange(columns) < jnp.array(lengths)[:, None]


def log(*rows):
    return jnp.log(jnp.array(rows))


def check_weights(fn, statistics, lengths=(7, 0, 10)):
    """Jitted equals eager, padding does not matter, an empty batch is fine."""
    mask = row_mask(*lengths)
    found = fn(*statistics, mask)
    assert found.dtype == jnp.float32
    assert not np.any(np.asarray(found)[~np.asarray(mask)])
    np.testing.assert_allclose(jax.jit(fn)(*statistics, mask), found, rtol=1e-5)
    dirty = [jnp.where(mask, x, 1e6) for x in statistics]
    np.testing.assert_allclose(fn(*dirty, mask), found, rtol=1e-5)
    wider = [jnp.pad(x, ((0, 0), (0, 3))) for x in statistics]
    padded = fn(*wider, row_mask(*lengths, columns=T + 3))
    np.testing.assert_allclose(padded[:, :T], found, rtol=1e-5)
    nothing = fn(*statistics, jnp.zeros_like(mask))
    np.testing.assert_array_equal(nothing, np.zeros((B, T)))

    def loss(x):
        return weighted_mean(x, fn(x, *statistics[1:], mask), mask)

    # Weights are stopped: the gradient is theirs alone.
    grad = jax.grad(loss)(statistics[0])
    np.testing.assert_allclose(grad, found / mask.sum(), rtol=1e-5)


# Statistics.


def test_top_k_forward_kl_by_hand():
    student = log([0.1, 0.2, 0.7])
    teacher = log([0.6, 0.3, 0.1])
    expected = 2 / 3 * np.log(2 / 3 / 0.1) + 1 / 3 * np.log(1 / 3 / 0.2)
    found = top_k_forward_kl(student, teacher, 2)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    jitted = jax.jit(top_k_forward_kl, static_argnums=2)
    np.testing.assert_allclose(jitted(student, teacher, 2), found, rtol=1e-5)
    # All of the vocabulary: forward KL; equal distributions: 0.
    full = np.sum(np.exp(teacher) * np.asarray(teacher - student))
    np.testing.assert_allclose(
        top_k_forward_kl(student, teacher, 9), [full], rtol=1e-5
    )
    np.testing.assert_allclose(
        top_k_forward_kl(teacher, teacher, 3), [0.0], atol=1e-6
    )


def test_top_k_forward_kl_is_finite_for_impossible_tokens():
    student = jnp.array([[-jnp.inf, 0.0, -jnp.inf]])
    teacher = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    for t in (teacher, jnp.full((1, 3), -jnp.inf)):
        value, grad = jax.value_and_grad(
            lambda s, t=t: top_k_forward_kl(s, t, 2).sum()
        )(student)
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))
    np.testing.assert_allclose(top_k_forward_kl(student, teacher, 1), [100.0])


def test_top_k_coverage_by_hand():
    student = log([0.5, 0.3, 0.2], [0.1, 0.2, 0.7])
    teacher = log([0.2, 0.3, 0.5], [0.6, 0.3, 0.1])
    found = top_k_coverage(student, teacher, 2)
    np.testing.assert_allclose(found, [0.5, 0.4], rtol=1e-6)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        top_k_coverage(student, teacher, 0)


# Losses.


def test_entropy_aware_loss_by_hand():
    loss = entropy_aware_loss(
        jnp.array([1.0, 1.0, 1.0]),
        jnp.array([3.0, 3.0, jnp.nan]),
        jnp.array([0.8, 0.9, 0.1]),
        alpha=0.5,
    )
    np.testing.assert_allclose(loss, [1.0, 2.5, 1.0])
    grads = jax.grad(
        lambda a, b: entropy_aware_loss(a, b, jnp.array([0.0, 1.0])).sum(),
        (0, 1),
    )(jnp.ones(2), jnp.ones(2))
    np.testing.assert_array_equal(grads, [[1, 1], [0, 1]])


def test_trust_region_loss_by_hand():
    # p_T >= p_S: inside for certain; p_T = 0: outside for certain.
    student = log([0.25, 0.5])[0]
    teacher = jnp.array([np.log(0.5), -jnp.inf])
    fallback = jnp.array([7.0, 9.0])
    lots = jnp.array([0.999, 0.0])
    found = trust_region_loss(lots, student, teacher, fallback)
    np.testing.assert_allclose(found, [-np.log(2) * np.log(0.25), 9.0])
    jitted = jax.jit(trust_region_loss)(lots, student, teacher, fallback)
    np.testing.assert_allclose(jitted, found, rtol=1e-6)
    grads = jax.grad(
        lambda s, f: trust_region_loss(lots, s, teacher, f).sum(), (0, 1)
    )(student, fallback)
    # The advantage is stopped: -A d log p.
    np.testing.assert_allclose(grads[0], [-np.log(2), 0], rtol=1e-6)
    np.testing.assert_array_equal(grads[1], [0, 1])


def test_trust_region_loss_draws_the_ratio():
    student = jnp.full((20_000,), np.log(0.8))
    teacher = jnp.full((20_000,), np.log(0.2))
    lots = jax.random.uniform(jax.random.key(1), student.shape)
    found = trust_region_loss(
        lots, student, teacher, jnp.full((20_000,), 100.0)
    )
    inside = np.mean(np.asarray(found) < 50)
    np.testing.assert_allclose(inside, 0.25, atol=0.015)


def test_trust_region_loss_of_impossible_tokens_is_finite():
    low = jnp.array([-jnp.inf, 0.0, -jnp.inf])
    high = jnp.array([0.0, -jnp.inf, -jnp.inf])
    value, grad = jax.value_and_grad(
        lambda s: trust_region_loss(
            jnp.full(3, 0.5), s, high, jnp.zeros(3)
        ).sum()
    )(low)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))


# Weights.


def test_tip_weights_by_hand():
    entropy = jnp.array([[2.0, 0.0, 1.0, 0.0, 9.0]])
    loss = jnp.array([[0.0, 4.0, 2.0, 1.0, 9.0]])
    mask = row_mask(4, columns=5)
    # Scores 1, 1, .5 + .5 - .25, .25: sure *or* wrong is enough.
    for fraction, kept in (
        (0.5, [1, 1, 0, 0, 0]),
        (0.51, [1, 1, 1, 0, 0]),
        (1.0, [1, 1, 1, 1, 0]),
    ):
        found = tip_weights(entropy, loss, mask, fraction=fraction)
        np.testing.assert_array_equal(found, [kept])


def test_teachability_weights_by_hand():
    loss = jnp.array([[4.0, 1.0, 2.0, 9.0]])
    coverage = jnp.array([[0.1, 0.9, 1.0, 1.0]])
    mask = row_mask(3, columns=4)
    found = teachability_weights(loss, coverage, mask, fraction=1 / 3)
    np.testing.assert_array_equal(found, [[0, 0, 1, 0]])
    found = teachability_weights(loss, coverage, mask, fraction=2 / 3)
    np.testing.assert_array_equal(found, [[0, 1, 1, 0]])


@pytest.mark.parametrize("fraction", [0.0, 1.2])
def test_top_fraction_out_of_bounds(fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction} must lie"):
        tip_weights(
            jnp.ones((1, 2)),
            jnp.ones((1, 2)),
            jnp.ones((1, 2), bool),
            fraction=fraction,
        )


def test_fire_weights_by_hand():
    # Five rollouts; the worst one (mean log p_T -9) is dropped.
    teacher_logp = jnp.array([[-1.0, -1], [-9, -9], [-2, 0], [-3, 9], [-4, 9]])
    mask = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]], bool)
    h_student = jnp.array([[0.0, 1], [2, 2], [0, 2], [0, 9], [2, 9]])
    h_teacher = jnp.array([[0.0, 0], [4, 0], [2, 4], [4, 9], [0, 9]])
    found = fire_weights(teacher_logp, h_student, h_teacher, mask)
    raw = np.array([[2, 3], [0, 0], [1.5, 2], [1, 0], [4, 0]])
    np.testing.assert_allclose(found, raw * 8 / raw.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        weighted_mean(jnp.ones((5, 2)), found, mask), 1.0, rtol=1e-6
    )
    # Empty rows are no rollouts: of four none is a whole fifth.
    mask = mask.at[0].set(False)
    found = fire_weights(teacher_logp, h_student, h_teacher, mask)
    assert np.all(np.asarray(found)[1] > 0)
    with pytest.raises(ValueError, match=r"drop=2\.0 must lie in 0\.\.1"):
        fire_weights(teacher_logp, h_student, h_teacher, mask, drop=2.0)


def test_agreement_weights_by_hand():
    loss = jnp.array(
        [[4.0, 2, 0, 0, 0, 9, 9], [0, 0, 0, 9, 9, 9, 9], [0, 9, 9, 9, 9, 9, 9]]
    )
    mask = row_mask(7, 2, 7, columns=7)
    found = agreement_weights(loss, mask, 0.5, window=3)
    # Means of three: -, -, 2, 2/3, 0, 3, 6: cut after the fifth token. The
    # second row is shorter than the window.
    expected = [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1] * 7]
    np.testing.assert_array_equal(found, expected)


def test_agreement_threshold_by_hand():
    loss = jnp.array([[4.0, 2, 0, 1, 0, 99, 99], [8.0, 99, 0, 0, 0, 0, 0]])
    mask = row_mask(5, 1, columns=7)
    # Means of two: 3, 1, .5, .5.
    found = agreement_threshold(loss, mask, quantile=0.5, window=2)
    np.testing.assert_allclose(found, 0.75)
    empty = agreement_threshold(loss, mask, window=6)
    assert empty == np.inf
    # Where no row is long enough, none is cut.
    kept = agreement_weights(loss, mask, empty, window=6)
    np.testing.assert_array_equal(kept, mask)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        agreement_threshold(loss, mask, window=0)


def test_prefix_weights_by_hand():
    student = jnp.array([[-1.0, -2.0, -3.0, -1.0, 0.0]])
    teacher = jnp.array([[-2.0, -2.0, 0.0, -5.0, 9.0]])
    # |A| = 1, 0, 3, 4: before each 0, 1, 1, 4 of 8.
    found = prefix_weights(student, teacher, row_mask(4, columns=5))
    expected = [[1.5, 1.5 - 1 / 16, 1.5 - 1 / 16, 1.25, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    agreed = prefix_weights(student, student, row_mask(4, columns=5))
    np.testing.assert_array_equal(agreed, [[1.5, 1.5, 1.5, 1.5, 0]])
    impossible = jnp.full_like(student, -jnp.inf)
    found = prefix_weights(student, impossible, row_mask(4, columns=5))
    assert np.all(np.isfinite(found))


PIECES = {
    "tip": lambda a, b, m: tip_weights(a, b, m, fraction=0.3),
    "teachability": lambda a, b, m: teachability_weights(a, b, m, fraction=0.3),
    "prefix": prefix_weights,
    "agreement": lambda a, _, m: agreement_weights(a, m, 0.8, window=3),
    "fire": lambda a, b, m: fire_weights(-a, b, a, m, drop=0.5),
}


@pytest.mark.parametrize("name", PIECES)
def test_weights_under_masks_jit_and_gradient(rng, name):
    statistics = jnp.asarray(rng.exponential(size=(2, B, T)), jnp.float32)
    check_weights(PIECES[name], tuple(statistics))
