"""Cheaper detectors: what they say of each candidate, and their report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from test_distill import logp_of, notes_of, objective

from topd_jax.experiments import detectors, surrogates
from topd_jax.losses import divergences
from topd_jax.training.score import read

GOAL = objective(branch_loss="forward_kl")


@pytest.fixture(scope="module")
def case(student, teacher):
    trajectories = make_trajectories()
    notes = notes_of(student, teacher, trajectories, GOAL)
    score = jax.jit(
        functools.partial(surrogates.surrogate_scores, objective=GOAL)
    )
    scores = score(student, teacher, trajectories, notes)
    return trajectories, notes, jax.device_get(scores)


def windows(values, mask, notes):
    """Each used candidate's K values, as a list of arrays, and its slot."""
    found = notes.candidates
    for b, m in np.argwhere(np.asarray(found.mask)):
        at = int(found.positions[b, m])
        stop = min(at + GOAL.window, int(mask[b].sum()))
        yield (b, m), np.asarray(values[b, at:stop])


def test_scores_are_those_of_dense_log_probabilities(case, student, teacher):
    trajectories, notes, scores = case
    ours = logp_of(student, trajectories)
    theirs = logp_of(teacher, trajectories)
    divergence = divergences.reverse_kl(ours, theirs)
    loss = -divergences.token_logprobs(theirs, trajectories.tokens)
    entropy = divergences.entropy(theirs)
    count = 0
    for values, first, mean in (
        (loss, "loss", "future_loss"),
        (divergence, "reverse_kl", "future_kl"),
        (entropy, "teacher_entropy", None),
    ):
        for slot, window in windows(values, trajectories.mask, notes):
            assert scores[first][slot] == pytest.approx(window[0], rel=2e-4)
            if mean:
                want = window.mean()
                assert scores[mean][slot] == pytest.approx(want, rel=2e-4)
            count += 1
    assert count > 30


def test_hidden_distance_is_the_cosine_of_mean_states(case, teacher):
    trajectories, notes, scores = case
    states = np.asarray(read(teacher, trajectories))
    checked = 0
    for slot, window in windows(states, trajectories.mask, notes):
        there = np.asarray(notes.teacher_windows.mask[slot])
        own = np.asarray(notes.teacher_window_hidden[slot])[there]
        if len(window) < 2 or len(own) < 2:
            continue
        a, b = window[1:].sum(0), own[1:].sum(0)
        want = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert scores["hidden_distance"][slot] == pytest.approx(want, abs=1e-4)
        checked += 1
    assert checked > 10


def test_futures_that_agree_have_no_hidden_distance(student):
    # A student that is its teacher and writes what the teacher would.
    trajectories = make_trajectories()
    notes = notes_of(student, student, trajectories, GOAL)
    same = notes.replace(
        teacher_windows=notes.student_windows,
        teacher_window_hidden=jnp.stack(
            [
                jax.vmap(
                    lambda row, at: jax.lax.dynamic_slice_in_dim(
                        jnp.pad(row, ((0, GOAL.window), (0, 0))),
                        at,
                        GOAL.window,
                    )
                )(notes.teacher_hidden, notes.candidates.positions[:, m])
                for m in range(GOAL.candidates)
            ],
            axis=1,
        ),
    )
    scores = surrogates.surrogate_scores(
        student, student, trajectories, same, GOAL
    )
    long = notes.student_windows.mask.sum(-1) > 1
    np.testing.assert_allclose(scores["hidden_distance"][long], 0, atol=1e-5)


def test_other_scores_are_judged_at_the_detector_s_rate():
    found = detectors.Judged(
        distance=np.array([0.9, 0.8, 0.1, 0.2], np.float32),
        loss=np.array([1.0, 5.0, 6.0, 0.5], np.float32),
        divergent=np.array([True, True, False, False]),
        fork=np.array([False, False, True, True]),
        window_fork=np.array([True, False, True, True]),
        scores={"future_loss": np.array([0.1, 0.2, 0.9, 0.8], np.float32)},
    )
    report = detectors.report(found)
    assert report["fork"]["future_loss"] == {
        "auc": 1.0, "precision": 1.0, "recall": 1.0
    }  # fmt: skip
    assert report["window_fork"]["future_loss"]["recall"] == 2 / 3
    both = detectors.concatenate([found, found])
    assert both.scores["future_loss"].shape == (8,)
