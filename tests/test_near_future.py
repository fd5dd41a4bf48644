"""Candidates, windows and masks of the near future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses.near_future import (
    divergence_mask,
    false_alarm_mask,
    future_loss,
    masked_quantile,
    matched_control_mask,
    scatter_to_tokens,
    select_candidates,
    slice_windows,
    student_windows,
)
from topd_jax.types import Candidates, Trajectories

T, M = 12, 4


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


def trajectories(tokens, mask):
    return Trajectories(
        prompt=jnp.zeros((*tokens.shape[:-1], 2), int),
        prompt_mask=jnp.ones((*tokens.shape[:-1], 2), bool),
        tokens=tokens,
        mask=mask,
        logp=jnp.zeros(tokens.shape),
        truncated=jnp.zeros(tokens.shape[:-1], bool),
    )


# Candidates.


def test_select_candidates_by_hand():
    loss = jnp.array([[1.0, 9.0, 2.0, 7.0, 8.0, 99.0], [5.0, 1, 99, 99, 99, 9]])
    found = select_candidates(loss, row_mask(5, 2, columns=6), count=3)
    np.testing.assert_array_equal(found.positions, [[1, 3, 4], [0, 1, 0]])
    np.testing.assert_array_equal(found.mask, [[1, 1, 1], [1, 1, 0]])


def test_select_candidates_fraction_rounds_up_by_row():
    loss = jnp.tile(jnp.arange(T, dtype=jnp.float32), (4, 1))
    mask = row_mask(12, 5, 1, 0)
    found = select_candidates(loss, mask, count=4, fraction=0.25)
    np.testing.assert_array_equal(found.mask.sum(-1), [3, 2, 1, 0])
    np.testing.assert_array_equal(found.positions[0], [9, 10, 11, 0])
    np.testing.assert_array_equal(found.positions[1], [3, 4, 0, 0])


@pytest.mark.parametrize("length", [1, 100, 700])
def test_select_candidates_fraction_is_exact(length):
    # 0.07 * 100 is 7.000000000000001 in double precision.
    loss = jnp.zeros((1, 700))
    found = select_candidates(
        loss, row_mask(length, columns=700), count=60, fraction=0.07
    )
    assert int(found.mask.sum()) == {1: 1, 100: 7, 700: 49}[length]


def test_select_candidates_never_takes_padding(rng):
    mask = jnp.asarray(rng.uniform(size=(50, T)) < 0.4)
    # Padding that would win, and losses below every padding value.
    loss = jnp.where(mask, jnp.asarray(rng.normal(size=(50, T))) - 50, 1e9)
    found = select_candidates(loss, mask, count=6)
    taken = jnp.take_along_axis(mask, found.positions, axis=-1)
    assert bool(jnp.all(taken | ~found.mask))
    expected = np.minimum(mask.sum(-1), 6)
    np.testing.assert_array_equal(found.mask.sum(-1), expected)
    used = np.asarray(found.mask)
    ascending = np.diff(np.asarray(found.positions), axis=-1) > 0
    assert np.all(ascending | ~used[:, 1:])


def test_select_candidates_leaves_out_what_is_not_a_number():
    loss = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf])
    found = select_candidates(loss, jnp.ones(4, bool), count=4)
    np.testing.assert_array_equal(found.positions, [1, 3, 0, 0])
    np.testing.assert_array_equal(found.mask, [1, 1, 0, 0])


def test_select_candidates_masked_equals_sliced(rng):
    loss = jnp.asarray(rng.normal(size=(T,)))
    whole = select_candidates(loss, jnp.arange(T) < 7, count=3)
    sliced = select_candidates(loss[:7], jnp.ones(7, bool), count=3)
    np.testing.assert_array_equal(whole.positions, sliced.positions)


def test_select_candidates_jit_and_leading_dimensions(rng):
    loss = jnp.asarray(rng.normal(size=(2, 3, T)))
    mask = jnp.asarray(rng.uniform(size=(2, 3, T)) < 0.8)

    def select(loss, mask):
        return select_candidates(loss, mask, count=M, fraction=0.3)

    whole = select(loss, mask)
    assert whole.positions.shape == (2, 3, M)
    for other in (jax.jit(select)(loss, mask), jax.vmap(select)(loss, mask)):
        jax.tree.map(np.testing.assert_array_equal, whole, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, r"count=0 must lie in 1\.\.12.*try 1$"),
        ({"count": 13}, r"count=13 must lie in 1\.\.12.*try 12$"),
        ({"count": 2, "fraction": 0.0}, r"fraction=0\.0 must lie above 0"),
        ({"count": 2, "fraction": 1.5}, r"fraction=1\.5"),
    ],
)
def test_select_candidates_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        select_candidates(jnp.zeros((1, T)), jnp.ones((1, T), bool), **options)


# Windows.


def test_student_windows_by_hand():
    tokens = jnp.arange(10, 10 + T)[None] + jnp.array([[0], [100]])
    rollout = trajectories(tokens, row_mask(T, 5))
    found = student_windows(
        rollout, candidates((0, 10), (3,), slots=2), length=4
    )
    expected = [
        [[10, 11, 12, 13], [20, 21, 0, 0]],
        [[113, 114, 0, 0], [0, 0, 0, 0]],
    ]
    np.testing.assert_array_equal(found.tokens, expected)
    np.testing.assert_array_equal(found.mask, np.asarray(expected) > 0)


def test_student_windows_jit_and_leading_dimensions(rng):
    tokens = jnp.asarray(rng.integers(1, 9, (2, 3, T)))
    rollout = trajectories(tokens, jnp.ones((2, 3, T), bool))
    at = Candidates(
        jnp.asarray(rng.integers(0, T, (2, 3, M))), jnp.ones((2, 3, M), bool)
    )

    def windows(rollout, at):
        return student_windows(rollout, at, length=5)

    whole = windows(rollout, at)
    assert whole.tokens.shape == (2, 3, M, 5)
    for other in (jax.jit(windows), jax.vmap(windows)):
        jax.tree.map(np.testing.assert_array_equal, whole, other(rollout, at))
    # A window longer than the completion is cut, not shifted.
    long = student_windows(rollout, at, length=T + 5)
    np.testing.assert_array_equal(long.tokens[..., :5], whole.tokens)
    np.testing.assert_array_equal(long.mask.sum(-1), T - at.positions)


def test_future_loss_by_hand():
    loss = jnp.arange(2.0 * T).reshape(2, T).at[1, 5:].set(jnp.nan)
    mask = row_mask(T, 5)
    at = candidates((0, 10), (3,), slots=3)
    found = future_loss(loss, mask, at, length=4)
    # Means of 0 1 2 3, of 10 11, of 15 16; an unused slot is 0.
    np.testing.assert_allclose(found, [[1.5, 10.5, 0], [15.5, 0, 0]])
    jitted = jax.jit(lambda x: future_loss(x, mask, at, length=4))(loss)
    np.testing.assert_array_equal(jitted, found)
    one = future_loss(loss, mask, at, length=1)
    np.testing.assert_array_equal(one, [[0, 10, 0], [15, 0, 0]])
    nothing = future_loss(loss, jnp.zeros_like(mask), at, length=4)
    np.testing.assert_array_equal(nothing, np.zeros((2, 3)))
    grad = jax.grad(lambda x: future_loss(x, mask, at, length=4).sum())(
        jnp.ones((2, T))
    )
    np.testing.assert_array_equal(grad, np.zeros((2, T)))  # it is data
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        future_loss(loss, mask, at, length=0)


def test_student_windows_bad_length():
    rollout = trajectories(jnp.ones((1, T), int), row_mask(T))
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        student_windows(rollout, candidates((1,)), length=0)


def test_slice_windows_of_vectors_has_a_gradient(rng):
    states = jnp.asarray(rng.normal(size=(2, T, 5)), jnp.float32)
    starts = jnp.array([[0, 2], [10, 11]])
    out = slice_windows(states, starts, 3)
    np.testing.assert_array_equal(out[0, 1], states[0, 2:5])
    np.testing.assert_array_equal(out[1, 1, 1:], np.zeros((2, 5)))
    grad = jax.grad(lambda s: slice_windows(s, starts, 3).sum())(states)
    count = [[1, 1, 2, 1, 1] + [0] * 7, [0] * 10 + [1, 2]]
    np.testing.assert_array_equal(grad[..., 0], count)


# Quantiles and masks.


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_masked_quantile_is_numpys(rng, quantile):
    values = rng.normal(size=(30, T)).astype(np.float32)
    mask = rng.uniform(size=(30, T)) < 0.5
    mask[0] = False
    mask[1] = np.arange(T) == 3
    values[~mask] = np.nan
    found = masked_quantile(jnp.asarray(values), jnp.asarray(mask), quantile)
    assert found[0] == np.inf
    for row, keep, result in list(zip(values, mask, found, strict=True))[1:]:
        np.testing.assert_allclose(
            result, np.quantile(row[keep], quantile), rtol=1e-5, atol=1e-6
        )


def test_divergence_mask_by_hand():
    # Ten candidates 0.0 .. 0.9: the 30th percentile is 0.27.
    distance = jnp.arange(12.0).reshape(2, 6) / 10
    at = Candidates(jnp.zeros((2, 6), int), jnp.arange(12).reshape(2, 6) < 10)
    divergent = divergence_mask(distance, at)
    expected = (np.arange(12) >= 3) & (np.arange(12) < 10)
    np.testing.assert_array_equal(divergent.ravel(), expected)
    alarms = false_alarm_mask(distance, at)
    np.testing.assert_array_equal(alarms.ravel(), np.arange(12) < 3)
    fixed = divergence_mask(distance, at, threshold=0.5)
    # Strictly above: 0.5 itself is a false alarm.
    expected = (np.arange(12) > 5) & (np.arange(12) < 10)
    np.testing.assert_array_equal(fixed.ravel(), expected)


def test_every_valid_candidate_is_one_or_the_other(rng):
    distance = jnp.asarray(rng.uniform(0, 2, (8, M)))
    at = Candidates(
        jnp.zeros((8, M), int), jnp.asarray(rng.uniform(size=(8, M)) < 0.7)
    )
    divergent = divergence_mask(distance, at, percentile=60.0)
    alarms = false_alarm_mask(distance, at, percentile=60.0)
    np.testing.assert_array_equal(divergent ^ alarms, at.mask)
    assert not np.any(divergent & alarms)
    # Values in unused slots do not matter.
    dirty = jnp.where(at.mask, distance, jnp.nan)
    np.testing.assert_array_equal(
        divergent, divergence_mask(dirty, at, percentile=60.0)
    )
    jitted = jax.jit(lambda d, c: divergence_mask(d, c, percentile=60.0))
    np.testing.assert_array_equal(divergent, jitted(distance, at))


def test_divergence_mask_with_ties_and_few_candidates():
    at = candidates((0, 1, 2, 3))
    equal = jnp.full((1, 4), 0.3)
    assert not np.any(divergence_mask(equal, at))
    assert np.all(false_alarm_mask(equal, at))
    # Three of four tie at the percentile: the one above stands out.
    tied = jnp.array([[0.3, 0.3, 0.7, 0.3]])
    np.testing.assert_array_equal(divergence_mask(tied, at), [[0, 0, 1, 0]])
    assert not np.any(divergence_mask(tied, candidates((5,))))
    none = candidates(())
    assert not np.any(divergence_mask(tied, none))
    assert not np.any(false_alarm_mask(tied, none))


def test_divergence_mask_percentile_is_of_the_batch_not_of_the_row():
    distance = jnp.array([[0.1, 0.2], [1.1, 1.2]])
    at = candidates((0, 1), (0, 1), slots=2)
    found = divergence_mask(distance, at, percentile=50.0)
    np.testing.assert_array_equal(found, [[0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 130.0}, r"percentile=130\.0 must lie in 0\.\.100"),
        ({"threshold": -0.1}, r"threshold=-0\.1 must be at least 0"),
    ],
)
def test_divergence_mask_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        divergence_mask(jnp.zeros((1, M)), candidates((1,)), **options)


def test_matched_control_mask(rng):
    divergent = jnp.asarray(rng.uniform(size=(10, M)) < 0.6)
    alarms = ~divergent & jnp.asarray(rng.uniform(size=(10, M)) < 0.6)
    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.vmap(lambda k: matched_control_mask(k, divergent, alarms))(keys)
    assert np.all(~draws | divergent)
    count = int(alarms.sum())
    assert 0 < count < int(divergent.sum())
    np.testing.assert_array_equal(draws.sum((1, 2)), count)
    # Every divergent candidate is as likely as every other.
    rate = np.asarray(draws.mean(0))[np.asarray(divergent)]
    np.testing.assert_allclose(rate, count / divergent.sum(), atol=0.12)
    one = matched_control_mask(keys[0], divergent, alarms)
    np.testing.assert_array_equal(one, draws[0])
    again = jax.jit(matched_control_mask)(keys[0], divergent, alarms)
    np.testing.assert_array_equal(one, again)


def test_matched_control_mask_takes_all_where_there_are_too_few():
    divergent = jnp.array([[True, False, False, False]])
    alarms = jnp.array([[False, True, True, False]])
    found = matched_control_mask(jax.random.key(0), divergent, alarms)
    np.testing.assert_array_equal(found, divergent)
    nothing = jnp.zeros((1, M), bool)
    key = jax.random.key(0)
    assert not np.any(matched_control_mask(key, divergent, nothing))
    assert not np.any(matched_control_mask(key, nothing, alarms))


def test_scatter_to_tokens():
    at = candidates((2, 5), (0,))
    flags = jnp.array([[True, False, True, True], [True, True, False, False]])
    found = scatter_to_tokens(at, flags, T)
    expected = np.zeros((2, T), bool)
    expected[0, 2] = expected[1, 0] = True
    np.testing.assert_array_equal(found, expected)
    jitted = jax.jit(scatter_to_tokens, static_argnums=2)
    np.testing.assert_array_equal(jitted(at, flags, T), expected)
