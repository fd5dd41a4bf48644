"""Optimal transport against exact assignment, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import linear_sum_assignment
from small_futures import windows

from topd_jax.losses.optimal_transport import (
    cosine_cost,
    transport,
    uniform_marginals,
    window_distance,
)

V, D, K = 40, 12, 8


@pytest.fixture
def embedding(rng):
    return jnp.asarray(rng.normal(size=(V, D)), jnp.float32)


def costs(rng, *lead):
    return cosine_cost(*jnp.asarray(rng.normal(size=(2, *lead, K, D))))


def uniform(*shape):
    return jnp.full(shape, 1 / shape[-1], jnp.float32)


def first(*lengths):
    """Uniform over the first tokens of each row."""
    return uniform_marginals(jnp.arange(K) < jnp.array(lengths)[:, None])


def test_cosine_cost_by_hand():
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    y = jnp.array([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]])
    want = [[0.0, 1.0, 2.0], [0.4, 0.2, 1.6]]
    assert_allclose(cosine_cost(x, y), want, atol=1e-6)
    # A zero vector has no direction, and no gradient.
    grad, value = jax.grad(
        lambda x: ((c := cosine_cost(x, y)).sum(), c), has_aux=True
    )(jnp.zeros((2, 2)))
    assert_array_equal(value, np.ones((2, 3)))
    assert_array_equal(grad, np.zeros((2, 2)))
    half = cosine_cost(x.astype(jnp.bfloat16), x)
    assert half.dtype == jnp.float32
    assert_allclose(np.diag(half), 0, atol=1e-6)


def test_two_by_two_by_hand():
    # By symmetry the plan is [[p, q], [q, p]], p + q = 1/2, q/p = e^(-c/eps).
    cost = jnp.array([[0.0, 0.2], [0.2, 0.0]])
    distance, plan = transport(
        cost, uniform(2), uniform(2), epsilon=0.1, position_weight=0.0
    )
    p = 0.5 / (1 + np.exp(-2.0))
    assert_allclose(plan, [[p, 0.5 - p], [0.5 - p, p]], atol=1e-6)
    assert_allclose(distance, 0.4 * (0.5 - p), atol=1e-6)


def test_close_to_exact_assignment(rng):
    cost = costs(rng, 20)
    args = cost, uniform(20, K), uniform(20, K)
    pairs = [linear_sum_assignment(c) for c in np.asarray(cost, float)]
    exact = np.array(
        [c[p].mean() for c, p in zip(np.asarray(cost), pairs, strict=True)]
    )
    distance, _ = transport(*args, position_weight=0.0)
    assert np.all(distance >= exact - 2e-3)
    assert_allclose(distance, exact, atol=0.06)
    distance, plan = transport(
        *args, epsilon=0.005, position_weight=0.0, max_iterations=4000
    )
    assert_allclose(distance, exact, atol=4e-3)
    for g, (_, columns) in zip(plan, pairs, strict=True):
        assert_array_equal(np.argmax(g, axis=1), columns)


def test_marginals_are_met_and_uneven_windows_too(rng):
    a, b = first(8, 3, 1), first(5, 8, 7)
    _, plan = transport(costs(rng, 3), a, b)
    # Exponents are 2 / 0.05 at the most, and rounded to 24 bits.
    assert_allclose(plan.sum(-1), a, atol=5e-6)
    assert_allclose(plan.sum(-2), b, atol=1e-3)
    assert np.all(np.asarray(plan)[(a[:, :, None] * b[:, None]) == 0] == 0)
    uneven = costs(rng)[:4, :5]  # the shape of a test below
    _, plan = transport(uneven, uniform(4), uniform(5))
    assert_allclose(plan.sum(-2), uniform(5), atol=1e-3)


def test_the_defaults_reach_the_converged_distance(rng, embedding):
    tokens, lengths = rng.integers(0, V, (2, 8, 50)), rng.integers(20, 51, 16)
    pair = windows(tokens[0], lengths[:8]), windows(tokens[1], lengths[8:])
    distance, _ = window_distance(embedding, *pair)
    converged, _ = window_distance(
        embedding, *pair, max_iterations=5000, threshold=1e-5
    )
    assert_allclose(distance, converged, atol=2e-3)


@pytest.mark.parametrize("epsilon", [0.005, 10])
def test_distances_keep_their_bounds(rng, embedding, epsilon):
    """Within rounding of 0..2, for any weight of positions that is allowed."""
    opposed = jnp.tile(embedding[:1], (V, 1)).at[V // 2 :].multiply(-1)
    for length, vectors, weight in (
        (50, embedding, 0.5),
        (50, opposed, 0.0),
        (50, opposed, 10.0),
        (2, opposed, 10.0),
    ):
        tokens = rng.integers(0, V // 2, (2, 8, length))
        lengths = rng.integers(1, length + 1, (2, 8))
        distance, plan = window_distance(
            vectors, windows(tokens[0], lengths[0]),
            windows(tokens[1] + V // 2, lengths[1]),
            epsilon=epsilon, position_weight=weight,
        )  # fmt: skip
        assert np.all(distance >= 0)
        assert np.all(distance <= 2 + 2e-3)
        assert_allclose(plan.sum((-1, -2)), 1, atol=1e-3)
        if vectors is opposed:
            assert_allclose(distance, 2, atol=2e-3)


@pytest.mark.parametrize("epsilon", [0.042, 0.05, 1.0])
def test_products_give_the_plan_of_logarithms(rng, embedding, epsilon):
    """Windows have bounded costs; transport knows no bound of its costs."""
    tokens, lengths = rng.integers(0, V, (2, 16, K)), rng.integers(0, K + 1, 32)
    ours = windows(tokens[0], lengths[:16])
    theirs = windows(tokens[1], lengths[16:])
    distance, plan = window_distance(embedding, ours, theirs, epsilon=epsilon)
    cost = cosine_cost(embedding[ours.tokens], embedding[theirs.tokens])
    marginals = map(uniform_marginals, (ours.mask, theirs.mask))
    want, want_plan = transport(cost, *marginals, epsilon=epsilon)
    assert_allclose(distance, want, atol=1e-5)
    assert_allclose(plan, want_plan, atol=1e-5)


def test_identical_windows_are_at_distance_zero(rng, embedding):
    # Distinct tokens, the plan is the diagonal; all alike, any plan costs 0
    # and the position term picks the diagonal.
    tokens = np.stack([rng.permutation(V)[:K], np.zeros(K, int)])
    same = windows(tokens, [K, K])
    distance, plan = window_distance(embedding, same, same)
    assert np.all(distance >= 0)
    assert_allclose(distance, 0, atol=2e-3)
    assert distance[1] < 1e-6
    assert_allclose(plan[0], np.eye(K) / K, atol=2e-3)
    assert_array_equal(np.argmax(plan[1], axis=1), np.arange(K))
    _, flat = window_distance(embedding, same, same, position_weight=0.0)
    assert_allclose(flat[1], np.full((K, K), 1 / K**2), atol=1e-6)


def test_padded_equals_unpadded(rng, embedding):
    students, teachers = rng.integers(0, V, (2, 5))
    # The position term is in units of the window, padding included.
    short, plan = window_distance(
        embedding, windows(students[:4], 4), windows(teachers, 5),
        position_weight=0.5 * 4 / 9,
    )  # fmt: skip
    # What padding costs does not matter; an empty side has distance 0.
    students, teachers = np.r_[students[:4], [7] * 5], np.r_[teachers, [9] * 4]
    cost = cosine_cost(embedding[students], embedding[teachers])
    a = uniform_marginals(jnp.arange(9) < jnp.array([[4], [0], [4], [0]]))
    b = uniform_marginals(jnp.arange(9) < jnp.array([[5], [5], [0], [0]]))
    exists = (a[..., None] > 0) & (b[:, None] > 0)
    padded, plans = transport(jnp.where(exists, cost, jnp.nan), a, b)
    assert_allclose(padded[0], short, rtol=1e-5)
    assert_allclose(plans[0, :4, :5], plan, atol=1e-5)
    assert np.all(np.asarray(plans)[~np.asarray(exists)] == 0)
    assert short > 0
    assert_array_equal(padded[1:], 0)
    with pytest.raises(AssertionError, match="int"):
        uniform_marginals(jnp.ones(4, int))


def test_a_distance_does_not_depend_on_its_batch_nor_on_x64(rng):
    cost, a = costs(rng, 2, 3), uniform(2, 3, K)
    together, plans = transport(cost, a, a)
    alone, plan = transport(cost[1, 2], a[1, 2], a[1, 2])
    assert_allclose(alone, together[1, 2], atol=1e-6)
    assert_allclose(plan, plans[1, 2], atol=1e-6)
    with jax.enable_x64(True):
        wide, _ = transport(cost, a, a)
    assert wide.dtype == jnp.float32
    assert_allclose(wide, together, atol=1e-5)


def test_the_plan_is_constant_and_the_distance_differentiable(rng):
    cost, a = costs(rng, 2), first(4, 0)
    plan = transport(cost, a, a)[1]
    on_distance, on_plan = (
        jax.grad(lambda c, i=i: transport(c, a, a)[i].sum())(cost)
        for i in range(2)
    )
    assert_allclose(on_distance, plan, atol=1e-7)
    assert_array_equal(on_plan, np.zeros_like(cost))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": np.nan}, r"epsilon=nan must lie in 0\.005\.\.10"),
        ({"position_weight": 1e6}, "position_weight=1000000.0 must lie"),
        ({"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_bad_options(options, message):
    cost = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=message):
        transport(cost, uniform(3), uniform(3), **options)


def test_marginals_must_fit():
    with pytest.raises(ValueError, match=r"marginals of shape \(3,\) and"):
        transport(jnp.zeros((3, 4)), uniform(3), uniform(3))
