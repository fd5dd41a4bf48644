"""Weights of tokens: by hand, under masks, jitted, and at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_futures import T, candidates, row_mask

from topd_jax.losses import token_weights as weights
from topd_jax.losses.divergences import weighted_mean

B, M = 3, 4


def n_step(divergent, at, mask, **options):
    options = dict(n=4, discount=0.9) | options
    return weights.n_step_weights(divergent, at, mask, **options)


SELECTED = jnp.asarray(np.random.default_rng(9).uniform(size=(B, T)) < 0.5)
AT = candidates((1, 3), (0,), (2, 5, 9))
FLAGS = jnp.ones((B, M), bool)
# name -> weights of two statistics and a mask.
WEIGHTS = {
    "median cap": lambda a, _, m: (
        weights.median_cap_weights(a, m, SELECTED[:, : m.shape[1]]) * m
    ),
    "n-step": lambda a, _, m: n_step(FLAGS, AT, m),
    "tip": lambda a, b, m: weights.tip_weights(a, b, m, fraction=0.3),
    "teachability": lambda a, b, m: weights.teachability_weights(
        a, b, m, fraction=0.3
    ),
    "prefix": weights.prefix_weights,
    "agreement": lambda a, _, m: weights.agreement_weights(a, m, 0.8, window=3),
    "fire": lambda a, b, m: weights.fire_weights(-a, b, a, m, drop=0.5),
    "renormalized": lambda a, _, m: weights.renormalized(
        jax.lax.stop_gradient(a) * m, m
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_masked_stopped_and_finite(rng, name):
    fn = WEIGHTS[name]
    values = jnp.asarray(rng.exponential(size=(2, B, T)), jnp.float32)
    mask = row_mask(7, 0, 10)

    @jax.jit
    def mean(x, mask):
        got = fn(x, values[1], mask)
        return weighted_mean(x, got, mask), got

    # Weights are stopped: the gradient is the weights' alone.
    grad, got = jax.grad(mean, has_aux=True)(values[0], mask)
    assert_allclose(grad, got / mask.sum(), rtol=1e-5)
    assert got.dtype == jnp.float32
    assert_array_equal(got * ~mask, np.zeros((B, T)))
    # Whatever stands outside of the mask; masked equals sliced.
    dirty = jnp.where(mask, values, 1e6)
    assert_allclose(jax.jit(fn)(*dirty, mask), got, rtol=1e-5)
    sliced = jax.jit(fn)(*values[..., :10], mask[:, :10])
    assert_allclose(got[:, :10], sliced, rtol=1e-5)
    _, none = mean(values[0], jnp.zeros_like(mask))
    assert_array_equal(none, np.zeros((B, T)))


def test_scatter_to_tokens():
    at = candidates((2, 5), (0,))
    flags = jnp.array([[True, False, True, True], [True, True, False, False]])
    want = np.zeros((2, T), bool)
    want[0, 2] = want[1, 0] = True
    got = weights.scatter_to_tokens(at, flags, T)
    assert_array_equal(got, want)


def test_median_cap_by_hand():
    loss = jnp.array([[4.0, 1.0, 2.0, 8.0, 3.0, 100.0]])
    mask = row_mask(5, columns=6)
    selected = jnp.array([[True, True, False, True, False, True]])
    got = weights.median_cap_weights(loss, mask, selected)
    # The median is 3: 4 and 8 come down to it, 1 is below it already.
    assert_allclose(got, [[0.75, 1, 1, 0.375, 1, 1]])
    mean = weighted_mean(loss, got, mask)
    assert_allclose(mean, (3 + 1 + 2 + 3 + 3) / 5)
    # Empty; median 0; infinite; a KL that rounds to less than 0.
    loss = jnp.array(
        [
            [jnp.nan, jnp.inf, 5],
            [0, 0, 2],
            [jnp.inf, 1, 2],
            [-1e-8, -1e-8, 1e-8],
        ]
    )
    mask = row_mask(0, 3, 3, 3, columns=3)
    got = weights.median_cap_weights(loss, mask, jnp.ones_like(mask))
    want = [[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert_array_equal(got, want)


def test_n_step_by_hand():
    mask = row_mask(7, 3, columns=8)
    at = candidates((1, 3), (2,), slots=2)
    flags = jnp.ones((2, 2), bool)
    got = n_step(flags, at, mask, n=3, discount=0.5, strength=2.0, cap=1.2)
    # Bonuses 1, .5, .25 from 1 and from 3; 1.25 at 3 is capped at 1.2.
    want = [[1, 3, 2, 3.4, 2, 1.5, 1, 0], [1, 1, 3, 0, 0, 0, 0, 0]]
    assert_allclose(got, want, rtol=1e-6)
    at, mask = candidates((0, 1, 2), slots=3), row_mask(6, columns=6)
    flags = jnp.ones((1, 3), bool)
    for options, want in (
        (dict(n=2, discount=1.0, cap=9.0), [2, 3, 3, 2, 1, 1]),
        (dict(n=2, discount=1.0), [2, 2, 2, 2, 1, 1]),
        # With discount 0 the divergent token alone.
        (dict(discount=0.0), [2, 2, 2, 1, 1, 1]),
    ):
        assert_allclose(n_step(flags, at, mask, **options), [want])
    assert_array_equal(n_step(~flags, at, mask), mask)


def test_tip_and_teachability_by_hand():
    entropy = jnp.array([[2.0, 0.0, 1.0, 0.0, 9.0]])
    loss = jnp.array([[0.0, 4.0, 2.0, 1.0, 9.0]])
    mask = row_mask(4, columns=5)
    # Scores 1, 1, .5 + .5 - .25, .25: sure *or* wrong is enough.
    for fraction, kept in (
        (0.5, [1, 1, 0, 0, 0]),
        (0.51, [1, 1, 1, 0, 0]),
        (1.0, [1, 1, 1, 1, 0]),
    ):
        got = weights.tip_weights(entropy, loss, mask, fraction=fraction)
        assert_array_equal(got, [kept])
    loss = jnp.array([[4.0, 1.0, 2.0, 9.0]])
    coverage = jnp.array([[0.1, 0.9, 1.0, 1.0]])
    mask = row_mask(3, columns=4)
    for fraction, kept in ((1 / 3, [0, 0, 1, 0]), (2 / 3, [0, 1, 1, 0])):
        got = weights.teachability_weights(
            loss, coverage, mask, fraction=fraction
        )
        assert_array_equal(got, [kept])
    # 0.07 * 100 tokens are 7, in float32 as well.
    hundred = jnp.arange(100.0)[None]
    everything = jnp.ones((1, 100), bool)
    kept = weights.tip_weights(hundred, hundred, everything, fraction=0.07)
    assert kept.sum() == 7


def test_fire_by_hand():
    # Five rollouts; the worst one (mean log p_T -9) is dropped.
    teacher_logp = jnp.array([[-1.0, -1], [-9, -9], [-2, 0], [-3, 9], [-4, 9]])
    mask = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]], bool)
    h_student = jnp.array([[0.0, 1], [2, 2], [0, 2], [0, 9], [2, 9]])
    h_teacher = jnp.array([[0.0, 0], [4, 0], [2, 4], [4, 9], [0, 9]])
    got = weights.fire_weights(teacher_logp, h_student, h_teacher, mask)
    raw = np.array([[2, 3], [0, 0], [1.5, 2], [1, 0], [4, 0]])
    assert_allclose(got, raw * 8 / raw.sum(), rtol=1e-6)
    mean = weighted_mean(jnp.ones((5, 2)), got, mask)
    assert_allclose(mean, 1.0, rtol=1e-6)
    # However small, weights add up to the tokens again.
    assert_allclose(weights.renormalized(got / 100, mask), got, rtol=1e-6)
    # Empty rows are no rollouts: of four none is a whole fifth.
    mask = mask.at[0].set(False)
    got = weights.fire_weights(teacher_logp, h_student, h_teacher, mask)
    assert np.all(np.asarray(got)[1] > 0)


def test_agreement_by_hand():
    loss = jnp.array(
        [[4.0, 2, 0, 0, 0, 9, 9], [0, 0, 0, 9, 9, 9, 9], [0, 9, 9, 9, 9, 9, 9]]
    )
    mask = row_mask(7, 2, 7, columns=7)
    got = weights.agreement_weights(loss, mask, 0.5, window=3)
    # Means of three: -, -, 2, 2/3, 0, 3, 6: cut after the fifth token. The
    # second row is shorter than the window.
    want = [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1] * 7]
    assert_array_equal(got, want)
    loss = jnp.array([[4.0, 2, 0, 1, 0, 99, 99], [8.0, 99, 0, 0, 0, 0, 0]])
    mask = row_mask(5, 1, columns=7)
    # Means of two: 3, 1, .5, .5.
    level = weights.agreement_threshold(loss, mask, quantile=0.5, window=2)
    assert_allclose(level, 0.75)
    # Where no row is long enough, none is cut.
    level = weights.agreement_threshold(loss, mask, window=6)
    assert level == np.inf
    kept = weights.agreement_weights(loss, mask, level, window=6)
    assert_array_equal(kept, mask)


def test_prefix_by_hand():
    student = jnp.array([[-1.0, -2.0, -3.0, -1.0, 0.0]])
    teacher = jnp.array([[-2.0, -2.0, 0.0, -5.0, 9.0]])
    mask = row_mask(4, columns=5)
    # |A| = 1, 0, 3, 4: before each 0, 1, 1, 4 of 8.
    got = weights.prefix_weights(student, teacher, mask)
    want = [[1.5, 1.5 - 1 / 16, 1.5 - 1 / 16, 1.25, 0]]
    assert_allclose(got, want, rtol=1e-6)
    agreed = weights.prefix_weights(student, student, mask)
    assert_array_equal(agreed, 1.5 * mask)
    impossible = jnp.full_like(student, -jnp.inf)
    got = weights.prefix_weights(student, impossible, mask)
    assert np.all(np.isfinite(got))


X = jnp.ones((1, T))
# What a mask and options give -> why some options, and any integer mask, do
# not go.
SINGLE = (FLAGS[:1], candidates((1,)))
OPTIONS = [
    (n_step, SINGLE, {"n": 0}, "n=0 must be at least 1"),
    (n_step, SINGLE, {"discount": 1.1}, r"discount=1\.1 must lie in 0\.\.1"),
    (n_step, SINGLE, {"cap": -1.0}, r"strength=1\.0 and cap=-1\.0"),
    (weights.tip_weights, (X, X), {"fraction": 0.0}, "0.0 must lie above 0"),
    (weights.teachability_weights, (X, X), {"fraction": 1.2}, "1.2 must lie"),
    (weights.fire_weights, (X, X, X), {"drop": 2.0}, r"must lie in 0\.\.1"),
    (weights.agreement_threshold, (X,), {"window": 0}, "must be at least 1"),
    (weights.prefix_weights, (X, X), {"gamma": -1}, "must be at least 0"),
    (weights.prefix_weights, (X, X), {"log_floor": 0.0}, r"=0\.0 must"),
]


@pytest.mark.parametrize(("fn", "arrays", "options", "message"), OPTIONS)
def test_options_out_of_bounds_and_integer_masks(fn, arrays, options, message):
    mask = row_mask(T)
    with pytest.raises(ValueError, match=message):
        fn(*arrays, mask, **options)
    with pytest.raises(AssertionError, match="int"):
        fn(*arrays, mask.astype(int), **options)
