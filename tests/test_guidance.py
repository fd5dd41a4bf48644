"""Trajectory guidance: targets, loss, log-probabilities, log-normaliser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses.divergences import weighted_mean
from topd_jax.losses.optimal_transport import window_distance
from topd_jax.losses.trajectory import (
    fused_log_normalizer,
    student_context_logprobs,
    trajectory_loss,
    trajectory_targets,
    window_mean,
)
from topd_jax.types import Candidates, Windows

B, T, M, K, V, D = 2, 9, 3, 4, 11, 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def windows(tokens, lengths):
    tokens = jnp.asarray(tokens)
    mask = jnp.arange(tokens.shape[-1]) < jnp.asarray(lengths)[..., None]
    return Windows(tokens, mask)


def problem(rng):
    """States, head, candidates and windows, some of them cut short."""
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    at = Candidates(
        jnp.array([[0, 3, 7], [1, 0, 0]]),
        jnp.array([[True, True, True], [True, False, False]]),
    )
    ours = windows(rng.integers(0, V, (B, M, K)), [[4, 4, 2], [3, 0, 0]])
    theirs = windows(rng.integers(0, V, (B, M, K)), [[4, 2, 4], [1, 4, 4]])
    plan = window_distance(head, ours, theirs)[1]
    return hidden, head, at, ours, theirs, plan


# Targets.


def test_trajectory_targets_by_hand():
    plan = jnp.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0]])
    theirs = windows([5, 7, 9], 2)
    literal = trajectory_targets(plan, theirs, anchor_first=False)
    expected = [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(literal, expected, rtol=1e-6)
    anchored = trajectory_targets(plan, theirs)
    np.testing.assert_allclose(
        anchored, [[1, 0, 0], [0, 1, 0], [0, 0, 0]], rtol=1e-6
    )
    # A row that the student does not have is dropped, the anchor too.
    cut = trajectory_targets(plan, theirs, windows([1, 2, 3], 0))
    np.testing.assert_array_equal(cut, np.zeros((3, 3)))


@pytest.mark.parametrize("anchor_first", [True, False])
def test_trajectory_targets_rows_are_distributions(rng, anchor_first):
    *_, ours, theirs, plan = problem(rng)
    targets = trajectory_targets(plan, theirs, ours, anchor_first=anchor_first)
    exists = ours.mask & theirs.mask.any(-1, keepdims=True)
    np.testing.assert_allclose(targets.sum(-1), exists, atol=1e-6)
    assert not np.any((targets > 0) & ~theirs.mask[..., None, :])
    # The plan alone knows which rows exist.
    alone = trajectory_targets(plan, theirs, anchor_first=anchor_first)
    np.testing.assert_array_equal(alone, targets)
    jitted = jax.jit(trajectory_targets, static_argnames="anchor_first")(
        plan, theirs, ours, anchor_first=anchor_first
    )
    np.testing.assert_allclose(jitted, targets, atol=1e-7)


def test_trajectory_targets_of_empty_windows():
    plan = jnp.zeros((M, K, K))
    targets = trajectory_targets(plan, windows(jnp.zeros((M, K), int), [0] * M))
    np.testing.assert_array_equal(targets, plan)


def test_trajectory_targets_are_stopped():
    theirs = windows([1, 2], 2)
    grad = jax.grad(lambda g: (trajectory_targets(g, theirs) ** 2).sum())(
        jnp.full((2, 2), 0.25)
    )
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))


# Loss.


def test_trajectory_loss_by_hand():
    theirs = windows([3, 8], 2)
    targets = jnp.array([[0.5, 0.5], [0.0, 1.0]])
    logp = jnp.log(jnp.array([[0.25, 0.5], [0.1, 0.2]]))
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.5)
    second = np.log(1 / 0.2)
    np.testing.assert_allclose(
        trajectory_loss(targets, logp, theirs), (first + second) / 2, rtol=1e-6
    )


def test_trajectory_loss_merges_a_token_that_occurs_twice():
    # Both columns are token 3: together they are all of the target's mass.
    theirs = windows([3, 3], 2)
    targets = jnp.array([[0.5, 0.5], [0.0, 0.0]])
    logp = jnp.log(jnp.array([[0.25, 0.25], [1.0, 1.0]]))
    loss = trajectory_loss(targets, logp, theirs)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    # A student who is the target has no loss.
    sure = trajectory_loss(targets, jnp.zeros((2, 2)), theirs)
    np.testing.assert_allclose(sure, 0.0, atol=1e-7)


def test_trajectory_loss_is_the_dense_kl(rng):
    hidden, head, at, _, theirs, plan = problem(rng)
    targets = trajectory_targets(plan, theirs, anchor_first=False)
    found = trajectory_loss(
        targets, student_context_logprobs(hidden, head, at, theirs), theirs
    )
    logp = np.asarray(jax.nn.log_softmax(hidden @ head.T), float)
    for b in range(B):
        for m in range(M):
            losses = []
            for i in range(K):
                q = np.zeros(V)
                for j in range(K):
                    q[theirs.tokens[b, m, j]] += targets[b, m, i, j]
                if q.sum() > 0:
                    p = logp[b, at.positions[b, m] + i]
                    used = q > 0
                    losses.append(np.sum((q * (np.log(q + 1e-300) - p))[used]))
            expected = np.mean(losses) if losses else 0.0
            np.testing.assert_allclose(found[b, m], expected, atol=1e-5)
            assert found[b, m] >= 0


def test_trajectory_loss_masked_equals_sliced(rng):
    theirs = windows(rng.integers(0, V, K), 2)
    logp = jnp.asarray(np.log(rng.uniform(size=(K, K))), jnp.float32)
    plan = np.zeros((K, K), np.float32)
    plan[:2, :2] = 0.25
    targets = trajectory_targets(jnp.asarray(plan), theirs, anchor_first=False)
    short = windows(theirs.tokens[:2], 2)
    np.testing.assert_allclose(
        trajectory_loss(targets, logp, theirs),
        trajectory_loss(targets[:2, :2], logp[:2, :2], short),
        rtol=1e-6,
    )


def test_trajectory_loss_jit_vmap_and_leading_dimensions(rng):
    hidden, head, at, _, theirs, plan = problem(rng)

    def loss(hidden, at, theirs, plan):
        logp = student_context_logprobs(hidden, head, at, theirs)
        targets = trajectory_targets(plan, theirs)
        return trajectory_loss(targets, logp, theirs)

    whole = loss(hidden, at, theirs, plan)
    assert whole.shape == (B, M)
    for other in (jax.jit(loss), jax.vmap(loss)):
        np.testing.assert_allclose(
            other(hidden, at, theirs, plan), whole, atol=1e-6
        )


def test_trajectory_loss_of_impossible_tokens_is_finite():
    theirs = windows([1, 2], 2)
    targets = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    logp = jnp.full((2, 2), -jnp.inf)
    value, grad = jax.value_and_grad(
        lambda x: trajectory_loss(targets, x, theirs)
    )(logp)
    np.testing.assert_allclose(value, (100 + (100 + np.log(0.5))) / 2)
    assert np.all(np.isfinite(grad))


def test_window_mean():
    values = jnp.array([[1.0, 3.0, jnp.nan], [jnp.inf] * 3])
    mask = jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(window_mean(values, mask), [2, 0])
    np.testing.assert_array_equal(jax.jit(window_mean)(values, mask), [2, 0])
    np.testing.assert_allclose(window_mean(values[:, :2], mask[:, :2])[0], 2)
    grad = jax.grad(lambda v: window_mean(v, mask).sum())(values)
    np.testing.assert_array_equal(grad, [[0.5, 0.5, 0], [0, 0, 0]])


@pytest.mark.parametrize("divergent", [True, False])
def test_gradients_are_finite_where_nothing_diverges(rng, divergent):
    hidden, head, at, _, theirs, plan = problem(rng)
    flags = at.mask & divergent

    def loss(hidden, head):
        logp = student_context_logprobs(hidden, head, at, theirs)
        values = trajectory_loss(trajectory_targets(plan, theirs), logp, theirs)
        return weighted_mean(values, mask=flags)

    grads = jax.grad(loss, argnums=(0, 1))(hidden, head)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
    assert all(bool(jnp.any(g != 0)) == divergent for g in grads)


# Log-probabilities.


def test_student_context_logprobs_equal_dense(rng):
    hidden, head, at, _, theirs, _ = problem(rng)
    found = student_context_logprobs(hidden, head, at, theirs)
    logp = jax.nn.log_softmax(hidden @ head.T)
    for b, m, i, j in np.ndindex(B, M, K, K):
        position = int(at.positions[b, m]) + i
        if position < T:
            expected = logp[b, position, theirs.tokens[b, m, j]]
            np.testing.assert_allclose(found[b, m, i, j], expected, atol=1e-5)
    assert np.all(np.isfinite(found))


def test_student_context_logprobs_gradient_equals_dense(rng):
    hidden, head, at, *_, theirs, _ = problem(rng)
    exists = (at.positions[..., None] + jnp.arange(K) < T)[..., None]
    weights = jnp.where(exists, jnp.asarray(rng.normal(size=(B, M, K, K))), 0.0)

    def fused(hidden, head):
        logp = student_context_logprobs(
            hidden, head, at, theirs, chunk_size=4, vocab_size=V - 2
        )
        return jnp.sum(weights * logp)

    def dense(hidden, head):
        logits = hidden @ head.T
        log_z = jax.nn.logsumexp(logits[..., : V - 2], axis=-1, keepdims=True)
        logp = logits - log_z
        rows = jnp.arange(B)[:, None, None, None]
        steps = at.positions[..., None] + jnp.arange(K)
        steps = jnp.minimum(steps, T - 1)[..., None]
        return jnp.sum(weights * logp[rows, steps, theirs.tokens[:, :, None]])

    found = jax.jit(jax.value_and_grad(fused, (0, 1)))(hidden, head)
    expected = jax.value_and_grad(dense, (0, 1))(hidden, head)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
        found,
        expected,
    )


def test_student_context_logprobs_takes_a_normalizer(rng):
    hidden, head, at, _, theirs, _ = problem(rng)
    zero = student_context_logprobs(hidden, head, at, theirs, jnp.zeros((B, T)))
    first = hidden[0, 3] @ head[theirs.tokens[0, 1, 0]]
    np.testing.assert_allclose(zero[0, 1, 0, 0], first, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 10_000, None])
def test_log_normalizer_in_chunks(rng, chunk_size):
    hidden, head, *_ = problem(rng)
    weights = jnp.asarray(rng.normal(size=(B, T)), jnp.float32)

    def dense(hidden, head):
        out = jax.nn.logsumexp(hidden @ head[: V - 1].T, axis=-1)
        return jnp.sum(weights * out), out

    def chunked(hidden, head):
        out = fused_log_normalizer(
            hidden, head, vocab_size=V - 1, chunk_size=chunk_size
        )
        return jnp.sum(weights * out), out

    expected = jax.grad(dense, (0, 1), has_aux=True)(hidden, head)
    found = jax.grad(chunked, (0, 1), has_aux=True)(hidden, head)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        found,
        expected,
    )


def test_log_normalizer_holds_one_chunk_of_logits():
    shapes = (
        jax.ShapeDtypeStruct((2, 256, 16), jnp.float32),
        jax.ShapeDtypeStruct((4096, 16), jnp.float32),
    )

    def grad(chunk_size):
        return jax.grad(
            lambda h, w: fused_log_normalizer(
                h, w, chunk_size=chunk_size
            ).sum(),
            (0, 1),
        )

    def temporary(chunk_size):
        compiled = jax.jit(grad(chunk_size)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * 256 * 4096 * 4
    assert temporary(512) >= logits
    assert temporary(32) < logits / 3


def test_log_normalizer_sums_the_heads_gradient_in_float32(rng):
    # 600 chunks' worth of small gradients: bfloat16 would lose most of them.
    hidden = jnp.ones((600, 2), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.bfloat16)
    grad = jax.grad(
        lambda w: fused_log_normalizer(hidden, w, chunk_size=1).sum()
    )(head)
    np.testing.assert_allclose(
        grad.astype(jnp.float32), [[600, 600]], rtol=5e-3
    )


def test_log_normalizer_bad_chunk():
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        fused_log_normalizer(
            jnp.zeros((1, 2, 3)), jnp.zeros((4, 3)), chunk_size=0
        )
