"""Candidates, windows and masks of the near future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from numpy.testing import assert_allclose, assert_array_equal
from small_futures import T, candidates, row_mask

from topd_jax.losses import near_future as near
from topd_jax.types import Candidates, completion_states

M = 4


def trajectories(tokens, mask):
    return make_trajectories(1).replace(tokens=tokens, mask=mask)


def test_select_candidates_by_hand():
    # Losses far below whatever stands for padding, and padding that would win.
    loss = [[1.0, 9, 2, 7, 8, 1e9], [5, 1, 1e9, 1e9, 1e9, 9]]
    mask = row_mask(5, 2, columns=6)
    got = near.select_candidates(jnp.array(loss) - 1e5, mask, count=3)
    assert_array_equal(got.positions, [[1, 3, 4], [0, 1, 0]])
    assert_array_equal(got.mask, [[1, 1, 1], [1, 1, 0]])
    # Among equal losses the earlier token; never what is not a number.
    loss = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf, 1.0, 1.0])
    got = near.select_candidates(loss, jnp.ones(6, bool), count=3)
    assert_array_equal(got.positions, [1, 3, 4])
    got = near.select_candidates(loss, jnp.ones(6, bool), count=6)
    assert_array_equal(got.mask.sum(), 4)


def test_select_candidates_fraction_rounds_up_by_row():
    loss = jnp.tile(jnp.arange(T, dtype=jnp.float32), (4, 1))
    mask = row_mask(12, 5, 1, 0)
    got = near.select_candidates(loss, mask, count=4, fraction=0.25)
    assert_array_equal(got.mask.sum(-1), [3, 2, 1, 0])
    assert_array_equal(got.positions[0], [9, 10, 11, 0])
    assert_array_equal(got.positions[1], [3, 4, 0, 0])
    # 0.07 * 100 is 7.000000000000001 in double precision.
    got = near.select_candidates(
        jnp.zeros((3, 700)), row_mask(1, 100, 700, columns=700), count=60,
        fraction=0.07,
    )  # fmt: skip
    assert_array_equal(got.mask.sum(-1), [1, 7, 49])


def test_a_shortlist_keeps_the_highest_scores_of_each_row():
    positions = jnp.array([[2, 5, 8, 9], [1, 4, 0, 0], [0, 0, 0, 0]])
    at = Candidates(positions, row_mask(4, 2, 0, columns=4))
    score = jnp.array([[1.0, 4.0, 2.0, 3.0], [0.0, 1.0, 9.0, 9.0], [9.0] * 4])
    got = near.shortlist(score, at, fraction=0.5)
    # Half of four, and of two; never a slot that is not used.
    assert_array_equal(got.positions, [[5, 9], [4, 0], [0, 0]])
    assert_array_equal(got.mask, [[1, 1], [1, 0], [0, 0]])
    whole = near.shortlist(score, at, fraction=1.0)
    assert_array_equal(whole.positions, at.positions)
    assert_array_equal(whole.mask, at.mask)
    with pytest.raises(ValueError, match="fraction=1.5 must lie above 0"):
        near.shortlist(score, at, fraction=1.5)


def test_student_windows_by_hand():
    tokens = jnp.arange(10, 10 + T)[None] + jnp.array([[0], [100]])
    rollout = trajectories(tokens, row_mask(T, 5))
    at = candidates((0, 10), (3,), slots=2)
    got = near.student_windows(rollout, at, length=4)
    want = np.array([[[10, 11, 12, 13], [20, 21, 0, 0]],
                     [[113, 114, 0, 0], [0, 0, 0, 0]]])  # fmt: skip
    assert_array_equal(got.tokens, want)
    assert_array_equal(got.mask, want > 0)
    # A window longer than the completion is cut, not shifted.
    long = near.student_windows(rollout, at, length=T + 5)
    assert_array_equal(long.tokens[..., :4], want)
    assert_array_equal(long.mask.sum(-1), [[12, 2], [2, 0]])


def test_future_loss_by_hand():
    loss = jnp.arange(2.0 * T).reshape(2, T).at[1, 5:].set(jnp.nan)
    mask, at = row_mask(T, 5), candidates((0, 10), (3,), slots=3)
    # Means of 0 1 2 3, of 10 11, of 15 16; an unused slot is 0.
    got = near.future_loss(loss, mask, at, length=4)
    assert_allclose(got, [[1.5, 10.5, 0], [15.5, 0, 0]])
    one = near.future_loss(loss, mask, at, length=1)
    assert_array_equal(one, [[0, 10, 0], [15, 0, 0]])
    nothing = near.future_loss(loss, jnp.zeros_like(mask), at, length=4)
    assert_array_equal(nothing, np.zeros((2, 3)))
    grad = jax.grad(lambda x: near.future_loss(x, mask, at, length=4).sum())
    assert_array_equal(grad(loss), np.zeros((2, T)))  # it is data


def test_masked_quantile_is_numpys(rng):
    values = rng.normal(size=(9, T)).astype(np.float32)
    mask = rng.uniform(size=(9, T)) < 0.5
    mask[:2] = [[False], [True]] * (np.arange(T) == 3)
    values[~mask] = np.nan
    for quantile in (0.0, 0.3, 0.5, 1.0):
        got = near.masked_quantile(values, mask, quantile)
        assert got[0] == np.inf
        for row, keep, result in zip(
            values[1:], mask[1:], got[1:], strict=True
        ):
            want = np.quantile(row[keep], quantile)
            assert_allclose(result, want, rtol=1e-5, atol=1e-6)


def test_divergence_mask_by_hand():
    # Ten candidates of two rows, 0.0 .. 0.9: the 30th percentile is 0.27.
    distance = jnp.arange(12.0).reshape(2, 6) / 10
    distance = distance.at[1, 4:].set(jnp.nan)  # unused slots do not matter
    i = np.arange(12).reshape(2, 6)
    at = Candidates(jnp.zeros((2, 6), int), jnp.asarray(i < 10))
    for options, want in (
        ({}, (i >= 3) & (i < 10)),
        # Strictly above: 0.5 itself is a false alarm.
        ({"threshold": 0.5}, (i > 5) & (i < 10)),
    ):
        divergent = near.divergence_mask(distance, at, **options)
        assert_array_equal(divergent, want)
    # Ties, and few candidates.
    at = candidates((0, 1, 2, 3))
    equal = jnp.full((1, 4), 0.3)
    assert not np.any(near.divergence_mask(equal, at))
    # Three of four tie at the percentile: the one above stands out.
    tied = equal.at[0, 2].set(0.7)
    assert_array_equal(near.divergence_mask(tied, at), [[0, 0, 1, 0]])
    assert not np.any(near.divergence_mask(tied, candidates((5,))))
    assert not np.any(near.divergence_mask(tied, candidates(())))


def test_matched_control_mask(rng):
    divergent = jnp.asarray(rng.uniform(size=(10, M)) < 0.6)
    alarms = ~divergent & jnp.asarray(rng.uniform(size=(10, M)) < 0.6)
    keys = jax.random.split(jax.random.key(0), 400)
    draw = near.matched_control_mask
    draws = jax.vmap(lambda k: draw(k, divergent, alarms))(keys)
    assert np.all(~draws | divergent)
    count = int(alarms.sum())
    assert 0 < count < int(divergent.sum())
    assert_array_equal(draws.sum((1, 2)), count)
    # Every divergent candidate is as likely as every other.
    rate = np.asarray(draws.mean(0))[np.asarray(divergent)]
    assert_allclose(rate, count / divergent.sum(), atol=0.12)
    # Where there are too few, all of them; of none, none.
    few = jnp.zeros_like(divergent).at[0, 0].set(True)
    assert_array_equal(draw(keys[0], few, ~few), few)
    assert not np.any(draw(keys[0], divergent, jnp.zeros_like(alarms)))


def test_completion_states_shifts_within_bounds():
    hidden = jnp.arange(5.0)[None, :, None]
    assert_array_equal(completion_states(hidden, 2)[0, :, 0], [1, 2, 3])
    for length in (0, -1, 5, 99):
        with pytest.raises(ValueError, match=f"={length} must lie in 1..4"):
            completion_states(hidden, length)


LOSS, MASK, AT = jnp.zeros((1, T)), row_mask(T), candidates((1,))
# function -> arguments that fit it.
CALLS = {
    near.select_candidates: (LOSS, MASK),
    near.future_loss: (LOSS, MASK, AT),
    near.student_windows: (trajectories(LOSS, MASK), AT),
    near.divergence_mask: (LOSS[:, :M], AT),
}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (near.select_candidates, {"count": 0}, "count=0 .*try 1$"),
        (near.select_candidates, {"count": 13}, r"in 1\.\.12.*try 12$"),
        (near.select_candidates, {"count": 2, "fraction": 0.0}, "=0.0 must"),
        (near.student_windows, {"length": 0}, "length=0 must be at least 1"),
        (near.divergence_mask, {"percentile": 130.0}, r"lie in 0\.\.100"),
        (near.divergence_mask, {"threshold": np.nan}, "=nan must be at least"),
    ],
)
def test_options_out_of_bounds(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(*CALLS[function], **options)


def test_integer_masks_are_refused():
    flags, at = AT.mask, AT.replace(mask=AT.mask.astype(int))
    for call in (
        lambda: near.select_candidates(LOSS, MASK.astype(int), count=2),
        lambda: near.future_loss(LOSS, MASK, at, length=2),
        lambda: near.student_windows(trajectories(LOSS, MASK), at, length=2),
        lambda: near.divergence_mask(LOSS[:, :M], at),
        lambda: near.matched_control_mask(jax.random.key(0), flags, at.mask),
    ):
        with pytest.raises(AssertionError, match="int"):
            call()
