"""Trajectory guidance: targets, loss and the student's log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_futures import windows
from small_heads import assert_close, gradients

from topd_jax.losses.trajectory import (
    student_context_logprobs,
    trajectory_loss,
    trajectory_targets,
    window_mean,
)
from topd_jax.types import Candidates, CappedHead, Layout, soft_cap

B, T, M, K, V, D = 2, 9, 3, 4, 11, 6


def problem(rng):
    """States, head, candidates and windows, one of them cut short."""
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    at = Candidates(
        jnp.array([[0, 3, 7], [1, 0, 0]]),
        jnp.array([[True, True, True], [True, False, False]]),
    )
    teachers = windows(rng.integers(0, V, (B, M, K)), [[4, 2, 4], [1, 4, 4]])
    return hidden, head, at, teachers


def test_targets_by_hand():
    plan = jnp.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0]])
    teachers = windows([5, 7, 9], 2)
    literal = trajectory_targets(plan, teachers, anchor_first=False)
    want = [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert_allclose(literal, want, rtol=1e-6)
    anchored = trajectory_targets(plan, teachers)
    want = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert_allclose(anchored, want, rtol=1e-6)
    # A row that the student does not have is dropped, the anchor too.
    cut = trajectory_targets(plan, teachers, windows([1, 2, 3], 0))
    assert_array_equal(cut, np.zeros((3, 3)))
    none = trajectory_targets(plan, windows([5, 7, 9], 0))
    assert_array_equal(none, np.zeros((3, 3)))
    # Columns that the teacher does not have are dropped.
    one = trajectory_targets(plan, windows([5, 7, 9], 1), anchor_first=False)
    assert_array_equal(one, [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    grad = jax.grad(lambda g: (trajectory_targets(g, teachers) ** 2).sum())
    assert_array_equal(grad(plan), np.zeros((3, 3)))  # stopped


def test_loss_by_hand():
    targets = jnp.array([[0.5, 0.5], [0.0, 1.0]])
    probabilities = jnp.log(jnp.array([[0.25, 0.5], [0.1, 0.2]]))
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.5)
    got = trajectory_loss(targets, probabilities, windows([3, 8], 2))
    assert_allclose(got, (first + np.log(1 / 0.2)) / 2, rtol=1e-6)
    # Both columns are token 3: together they are all of the target's mass.
    twice, targets = windows([3, 3], 2), jnp.array([[0.5, 0.5], [0.0, 0.0]])
    quarter = jnp.log(jnp.array([[0.25, 0.25], [1.0, 1.0]]))
    got = trajectory_loss(targets, quarter, twice)
    assert_allclose(got, np.log(4), rtol=1e-6)
    # A student who is the target has no loss.
    sure = trajectory_loss(targets, jnp.zeros((2, 2)), twice)
    assert_allclose(sure, 0.0, atol=1e-7)
    # Impossible tokens cost the floor.
    value, grad = jax.value_and_grad(
        lambda x: trajectory_loss(targets, x, windows([1, 2], 2))
    )(jnp.full((2, 2), -jnp.inf))
    assert_allclose(value, 100 + np.log(0.5))
    assert_array_equal(grad, np.zeros((2, 2)))


def test_window_mean():
    values = jnp.array([[1.0, 3.0, jnp.nan], [jnp.inf] * 3])
    mask = jnp.array([[True, True, False], [False] * 3])
    assert_array_equal(window_mean(values, mask), [2, 0])
    grad = jax.grad(lambda v: window_mean(v, mask).sum())(values)
    assert_array_equal(grad, [[0.5, 0.5, 0], [0, 0, 0]])
    with pytest.raises(AssertionError, match="int"):
        window_mean(values, mask.astype(int))


def test_context_logprobs_equal_dense(rng):
    hidden, head, at, teachers = problem(rng)
    exists = (at.positions[..., None] + jnp.arange(K) < T)[..., None]
    weights = jnp.where(exists, jnp.asarray(rng.normal(size=(B, M, K, K))), 0.0)

    def chunked(hidden, head):
        out = student_context_logprobs(
            hidden,
            CappedHead(head, 2.0),
            at,
            teachers,
            vocab_size=V - 1,
            layout=Layout(4),
        )
        return jnp.sum(weights * out), out

    def dense(hidden, head):
        rows = jnp.arange(B)[:, None, None, None]
        steps = jnp.minimum(at.positions[..., None] + jnp.arange(K), T - 1)
        logits = jnp.matmul(hidden, head.T, precision="highest")
        logits = soft_cap(logits, 2.0)
        chosen = logits[rows, steps[..., None], teachers.tokens[:, :, None]]
        total = jax.nn.logsumexp(logits[..., : V - 1], axis=-1)
        out = chosen - total[rows, steps[..., None]]
        return jnp.sum(weights * out), jnp.where(exists, out, 0)

    (value, out), grads = gradients(chunked, (hidden, head))
    assert np.all(np.isfinite(out))
    got = (value, jnp.where(exists, out, 0)), grads
    want = gradients(dense, (hidden, head))
    assert_close(got, want)


def test_a_head_of_more_bits_than_the_states_is_not_rounded(rng):
    """Master weights in float32, computed in bfloat16: no log p above 0."""
    _, head, at, teachers = problem(rng)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)) * 30, jnp.bfloat16)
    out = student_context_logprobs(hidden, head, at, teachers)
    wide = hidden.astype(jnp.float32)
    want = student_context_logprobs(wide, head, at, teachers)
    assert_allclose(out, want, rtol=1e-5, atol=1e-4)
    exists = (at.positions[..., None] + jnp.arange(K) < T)[..., None]
    assert jnp.max(jnp.where(exists, out, 0)) <= 1e-4
