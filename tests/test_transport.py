"""Optimal transport against exact assignment, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from topd_jax.losses.optimal_transport import (
    cosine_cost,
    transport,
    uniform_marginals,
    window_distance,
)
from topd_jax.types import Windows

V, D, K = 40, 12, 8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def table(rng):
    return jnp.asarray(rng.normal(size=(V, D)), jnp.float32)


def windows(tokens, lengths):
    tokens = jnp.asarray(tokens)
    mask = jnp.arange(tokens.shape[-1]) < jnp.asarray(lengths)[..., None]
    return Windows(tokens, mask)


def uniform(*shape):
    return jnp.full(shape, 1 / shape[-1], jnp.float32)


# Cosine cost.


def test_cosine_cost_by_hand():
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    y = jnp.array([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]])
    expected = [[0.0, 1.0, 2.0], [0.4, 0.2, 1.6]]
    np.testing.assert_allclose(cosine_cost(x, y), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(cosine_cost)(x, y), expected, atol=1e-6)


def test_cosine_cost_of_zero_vectors_is_one_with_zero_gradient():
    x, y = jnp.zeros((2, 3)), jnp.ones((4, 3))
    np.testing.assert_array_equal(cosine_cost(x, y), np.ones((2, 4)))
    grad = jax.grad(lambda x: cosine_cost(x, y).sum())(x)
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_cosine_cost_is_float32_for_bfloat16(rng):
    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16)
    assert cosine_cost(x, x).dtype == jnp.float32
    np.testing.assert_allclose(np.diag(cosine_cost(x, x)), 0, atol=1e-6)


def test_uniform_marginals():
    mask = jnp.array([[True, True, True, False], [False] * 4])
    expected = [[1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(uniform_marginals(mask), expected, rtol=1e-6)


# The plan.


def test_two_by_two_by_hand():
    # By symmetry the plan is [[p, q], [q, p]], p + q = 1/2, q/p = e^(-c/eps).
    cost = jnp.array([[0.0, 0.2], [0.2, 0.0]])
    distance, plan = transport(
        cost, uniform(2), uniform(2), epsilon=0.1, position_weight=0.0
    )
    p = 0.5 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(plan, [[p, 0.5 - p], [0.5 - p, p]], atol=1e-6)
    np.testing.assert_allclose(distance, 0.4 * (0.5 - p), atol=1e-6)


def test_near_exact_assignment_at_small_epsilon(rng):
    x, y = rng.normal(size=(2, 5, K, D))
    cost = cosine_cost(jnp.asarray(x), jnp.asarray(y))
    distance, plan = transport(
        cost,
        uniform(5, K),
        uniform(5, K),
        epsilon=0.002,
        position_weight=0.0,
        max_iterations=4000,
    )
    for c, d, g in zip(np.asarray(cost), distance, plan, strict=True):
        rows, columns = linear_sum_assignment(c)
        np.testing.assert_allclose(d, c[rows, columns].mean(), atol=2e-3)
        np.testing.assert_array_equal(np.argmax(g, axis=1), columns)


def test_default_epsilon_stays_close_to_exact(rng):
    x, y = rng.normal(size=(2, 20, K, D))
    cost = cosine_cost(jnp.asarray(x), jnp.asarray(y))
    distance, _ = transport(
        cost, uniform(20, K), uniform(20, K), position_weight=0.0
    )
    exact = [
        c[linear_sum_assignment(c)].mean() for c in np.asarray(cost, float)
    ]
    assert np.all(distance >= np.asarray(exact) - 2e-3)
    np.testing.assert_allclose(distance, exact, atol=0.06)


def test_marginals_are_met(rng):
    lengths = np.array([[8, 3, 1], [5, 8, 7]])
    a = uniform_marginals(jnp.arange(K) < lengths[0][:, None])
    b = uniform_marginals(jnp.arange(K) < lengths[1][:, None])
    cost = cosine_cost(*jnp.asarray(rng.normal(size=(2, 3, K, D))))
    _, plan = transport(cost, a, b)
    # Exponents are 2 / 0.05 at the most, and rounded to 24 bits.
    np.testing.assert_allclose(plan.sum(-1), a, atol=5e-6)
    np.testing.assert_allclose(plan.sum(-2), b, atol=1e-3)
    assert np.all(np.asarray(plan)[(a[:, :, None] * b[:, None]) == 0] == 0)


def test_the_defaults_reach_the_converged_distance(rng):
    embedding = table(rng)
    ours = windows(rng.integers(0, V, (16, 50)), rng.integers(20, 51, 16))
    theirs = windows(rng.integers(0, V, (16, 50)), rng.integers(20, 51, 16))
    distance, _ = window_distance(embedding, ours, theirs)
    converged, _ = window_distance(
        embedding, ours, theirs, max_iterations=5000, threshold=1e-5
    )
    np.testing.assert_allclose(distance, converged, atol=2e-3)


def test_symmetric(rng):
    x, y = jnp.asarray(rng.normal(size=(2, 4, K, D)))
    a = uniform_marginals(jnp.arange(K) < jnp.array([8, 5, 2, 7])[:, None])
    options = {"threshold": 1e-5, "max_iterations": 2000}
    forward, plan = transport(cosine_cost(x, y), a, a[::-1], **options)
    backward, nalp = transport(cosine_cost(y, x), a[::-1], a, **options)
    np.testing.assert_allclose(forward, backward, atol=1e-4)
    np.testing.assert_allclose(plan, nalp.swapaxes(-1, -2), atol=1e-4)


def test_identical_windows_are_at_distance_zero(rng):
    embedding = table(rng)
    # Distinct tokens: the plan is the diagonal.
    same = windows([rng.permutation(V)[:K]], [K])
    distance, plan = window_distance(embedding, same, same)
    assert 0 <= distance[0] < 2e-3
    np.testing.assert_allclose(plan[0], np.eye(K) / K, atol=2e-3)
    # A shift by one place costs next to nothing either: order is a hint only.
    shifted = windows([np.roll(same.tokens[0], 1)], [K])
    assert window_distance(embedding, same, shifted)[0][0] < 0.02


def test_position_term_breaks_ties_and_is_not_reported():
    # All tokens alike: any plan costs 0, the position term picks the diagonal.
    embedding = jnp.eye(2)
    alike = windows(jnp.zeros((K,), int), K)
    distance, plan = window_distance(embedding, alike, alike)
    np.testing.assert_allclose(distance, 0.0, atol=1e-6)
    np.testing.assert_array_equal(np.argmax(plan, axis=1), np.arange(K))
    _, flat = window_distance(embedding, alike, alike, position_weight=0.0)
    np.testing.assert_allclose(flat, np.full((K, K), 1 / K**2), atol=1e-6)


# Padding, batches, transformations.


def test_padded_equals_unpadded(rng):
    embedding = table(rng)
    ours, theirs = rng.integers(0, V, (2, 5))
    # The position term is in units of the window, padding included.
    short, plan = window_distance(
        embedding,
        windows(ours[:4], 4),
        windows(theirs, 5),
        position_weight=0.5 * 4 / 9,
    )
    padded, padded_plan = window_distance(
        embedding,
        windows(np.r_[ours[:4], [7] * 5], 4),
        windows(np.r_[theirs, [9] * 4], 5),
    )
    np.testing.assert_allclose(padded, short, atol=1e-6)
    np.testing.assert_allclose(padded_plan[:4, :5], plan, atol=1e-5)
    assert np.all(padded_plan[4:] == 0)
    assert np.all(padded_plan[:, 5:] == 0)


def test_a_distance_does_not_depend_on_its_batch(rng):
    cost = cosine_cost(*jnp.asarray(rng.normal(size=(2, 6, K, D))))
    together, plans = transport(cost, uniform(6, K), uniform(6, K))
    for i in range(6):
        alone, plan = transport(cost[i], uniform(K), uniform(K))
        np.testing.assert_allclose(alone, together[i], atol=1e-6)
        np.testing.assert_allclose(plan, plans[i], atol=1e-6)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_window_has_distance_zero(rng, lengths):
    embedding = table(rng)
    tokens = rng.integers(0, V, (2, 3, K))
    ours = windows(tokens[0], [lengths[0], K, K])
    theirs = windows(tokens[1], [lengths[1], K, K])
    distance, plan = window_distance(embedding, ours, theirs)
    assert distance[0] == 0
    assert np.all(plan[0] == 0)
    assert np.all(np.isfinite(plan))
    assert np.all(distance[1:] > 0)


def test_what_padding_costs_does_not_matter(rng):
    cost = np.array(cosine_cost(*jnp.asarray(rng.normal(size=(2, K, D)))))
    a = uniform_marginals(jnp.arange(K) < 5)
    clean, _ = transport(jnp.asarray(cost), a, a)
    cost[5:] = np.nan
    cost[:, 5:] = np.inf
    dirty, plan = transport(jnp.asarray(cost), a, a)
    assert dirty == clean
    assert np.all(np.isfinite(plan))


def test_free_leading_dimensions_jit_and_vmap(rng):
    cost = cosine_cost(*jnp.asarray(rng.normal(size=(2, 2, 3, K, D))))
    a = uniform(2, 3, K)
    distance, plan = transport(cost, a, a)
    assert distance.shape == (2, 3)
    assert plan.shape == (2, 3, K, K)
    for other in (jax.jit(transport), jax.vmap(transport)):
        d, g = other(cost, a, a)
        np.testing.assert_allclose(d, distance, atol=1e-5)
        np.testing.assert_allclose(g, plan, atol=1e-5)


def test_the_plan_is_constant_and_the_distance_differentiable(rng):
    cost = cosine_cost(*jnp.asarray(rng.normal(size=(2, 2, K, D))))
    a = uniform_marginals(jnp.arange(K) < jnp.array([[4], [0]]))
    plan = transport(cost, a, a)[1]
    grad = jax.grad(lambda c: transport(c, a, a)[0].sum())(cost)
    np.testing.assert_allclose(grad, plan, atol=1e-7)
    grad = jax.grad(lambda c: transport(c, a, a)[1].sum())(cost)
    np.testing.assert_array_equal(grad, np.zeros_like(cost))


def test_uneven_windows(rng):
    cost = jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32)
    _, plan = transport(cost, uniform(3), uniform(5))
    assert plan.shape == (3, 5)
    np.testing.assert_allclose(plan.sum(-2), uniform(5), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon=0\.0 must be above 0"),
        ({"position_weight": -1.0}, r"position_weight=-1\.0"),
        ({"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        transport(jnp.zeros((3, 3)), uniform(3), uniform(3), **options)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"marginals of shape \(3,\) and"):
        transport(jnp.zeros((3, 4)), uniform(3), uniform(3))
