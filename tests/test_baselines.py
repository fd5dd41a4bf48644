"""Sibling methods as variants: the step against dense sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from test_distill import gradient, logp_of, notes_of, objective, step

from topd_jax.losses import divergences, siblings
from topd_jax.objectives.objective import Siblings

OPTIONS = Siblings(
    top_k=3, alpha=2.0, entropy_threshold=1.5, fraction=0.4, drop=0.3,
    quantile=0.6, window=3, gamma=0.7,
)  # fmt: skip


def goal_of(variant):
    return objective(variant=variant, siblings=OPTIONS)


def weights_by_hand(variant, student_logp, teacher_logp, trajectories):
    """From dense log-probabilities, method by method."""
    mask = trajectories.mask
    loss = divergences.reverse_kl(student_logp, teacher_logp)
    ours = divergences.token_logprobs(student_logp, trajectories.tokens)
    theirs = divergences.token_logprobs(teacher_logp, trajectories.tokens)
    entropies = (
        divergences.entropy(student_logp),
        divergences.entropy(teacher_logp),
    )
    if variant == "prefix":
        return siblings.prefix_weights(ours, theirs, mask, gamma=0.7)
    if variant == "fire":
        return siblings.fire_weights(theirs, *entropies, mask, drop=0.3)
    if variant == "tip":
        kept = siblings.tip_weights(entropies[0], loss, mask, fraction=0.4)
    elif variant == "teachability":
        kept = siblings.teachability_weights(
            loss,
            siblings.top_k_coverage(student_logp, teacher_logp, 3),
            mask,
            fraction=0.4,
        )
    else:
        level = siblings.agreement_threshold(loss, mask, quantile=0.6, window=3)
        kept = siblings.agreement_weights(loss, mask, level, window=3)
        assert 0 < kept.sum() < mask.sum()  # something is cut
    # The mean is over the kept tokens alone.
    return kept * mask.sum() / kept.sum()


@pytest.fixture(scope="module")
def case(student, teacher):
    return student, teacher, make_trajectories()


@pytest.mark.parametrize(
    "variant", ["tip", "teachability", "fire", "agreement", "prefix"]
)
def test_weights_are_those_of_dense_statistics(case, variant):
    student, teacher, trajectories = case
    goal = goal_of(variant)
    notes = notes_of(student, teacher, trajectories, goal)
    dense = logp_of(student, trajectories), logp_of(teacher, trajectories)
    want = weights_by_hand(variant, *dense, trajectories)
    np.testing.assert_allclose(notes.weights, want, rtol=2e-4, atol=2e-4)

    def loss(model):
        token_loss = divergences.reverse_kl(
            logp_of(model, trajectories), dense[1]
        )
        return divergences.weighted_mean(token_loss, want, trajectories.mask)

    value, grads = jax.value_and_grad(loss)(student)
    state, metrics = step(student, teacher, trajectories, goal)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-4)
    close(gradient(student, state), grads)


@pytest.mark.parametrize("variant", ["entropy_aware", "trust_region"])
def test_losses_are_those_of_dense_log_probabilities(case, variant):
    student, teacher, trajectories = case
    goal = goal_of(variant)
    notes = notes_of(student, teacher, trajectories, goal)
    teacher_logp = logp_of(teacher, trajectories)

    def loss(model):
        logp = logp_of(model, trajectories)
        beyond = siblings.top_k_forward_kl(logp, teacher_logp, 3)
        if variant == "trust_region":
            token_loss = siblings.trust_region_loss(
                notes.lots,
                divergences.token_logprobs(logp, trajectories.tokens),
                divergences.token_logprobs(teacher_logp, trajectories.tokens),
                beyond,
            )
        else:
            token_loss = siblings.entropy_aware_loss(
                divergences.reverse_kl(logp, teacher_logp),
                beyond,
                divergences.entropy(teacher_logp),
                alpha=2.0,
                entropy_threshold=1.5,
            )
        return divergences.weighted_mean(token_loss, mask=trajectories.mask)

    value, grads = jax.value_and_grad(loss)(student)
    state, metrics = step(student, teacher, trajectories, goal)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-4)
    close(gradient(student, state), grads)


def test_lots_are_drawn_anew_from_the_key(case):
    goal = goal_of("trust_region")
    one, two, again = (notes_of(*case, goal, seed=s).lots for s in (1, 2, 1))
    assert not jnp.array_equal(one, two)
    assert jnp.array_equal(one, again)
    assert ((one >= 0) & (one < 1)).all()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("fraction", 0.0, "siblings.fraction=0.0 must lie above 0"),
        ("drop", 1.5, r"siblings.drop=1.5 must lie in 0..1"),
        ("quantile", -0.1, r"siblings.quantile=-0.1 must lie in 0..1"),
        ("top_k", 0, "siblings.top_k=0 must be at least 1"),
        ("window", 0, "siblings.window=0 must be at least 1"),
    ],
)
def test_settings_out_of_bounds_are_named(name, value, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(OPTIONS, **{name: value})


def close(found, want):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)

    jax.tree.map(one, found, want)
