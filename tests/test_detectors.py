"""The detector against the truth: AUC, rates, and candidates by hand."""

import jax
import numpy as np
import pytest

from topd_jax.experiments import detectors
from topd_jax.experiments.detectors import LabeledCandidates, auc
from topd_jax.experiments.observe import Observed
from topd_jax.types import Candidates, Scored, Trajectories


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 6, 40).astype(np.float32)  # many ties
    positive = rng.random(40) < 0.3
    pairs = score[positive][:, None] - score[~positive]
    share = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    assert auc(score, positive) == pytest.approx(share)
    assert auc(score, score > 2) == 1
    assert auc(score, score < 3) == 0
    assert auc(score, np.ones(40, bool)) is None
    assert auc(score, np.zeros(40, bool)) is None


CANDIDATES = LabeledCandidates(
    distance=np.array([0.9, 0.8, 0.1, 0.2], np.float32),
    loss=np.array([1.0, 5.0, 6.0, 0.5], np.float32),
    future_loss=np.array([0.9, 0.2, 0.8, 0.1], np.float32),
    divergent=np.array([True, True, False, False]),
    fork=np.array([True, False, False, False]),
    window_fork=np.array([True, True, True, False]),
)


def test_report_by_hand():
    report = detectors.report(CANDIDATES)
    assert report["candidates"] == 4
    assert report["flagged"] == 2
    fork, window = report["fork"], report["window_fork"]
    assert fork["share"] == 0.25
    assert fork["distance"] == {"auc": 1.0, "precision": 0.5, "recall": 1.0}
    # The losses flag their two highest, as many as the distance does.
    assert fork["loss"] == {"auc": 1 / 3, "precision": 0.0, "recall": 0.0}
    assert fork["future_loss"] == {"auc": 1.0, "precision": 0.5, "recall": 1.0}
    two_of_three = {"precision": 1.0, "recall": 2 / 3}
    assert window["distance"] == {"auc": pytest.approx(2 / 3)} | two_of_three
    assert window["loss"] == {"auc": 1.0} | two_of_three
    assert window["future_loss"] == {"auc": 1.0} | two_of_three


def test_report_of_nothing_has_no_numbers():
    report = detectors.report(jax.tree.map(lambda x: x[:0], CANDIDATES))
    assert report["candidates"] == report["flagged"] == 0
    assert report["fork"]["share"] is None
    assert set(report["fork"]["distance"].values()) == {None}


class Letters:
    """A tokenizer of single characters; id 0 ends."""

    eos_ids = (0,)

    def pieces(self, ids):
        return [chr(i) if i else "" for i in ids]


PROBLEM = "3+4*5?"
RIGHT = ", then 23#23."
FORK = 5  # where the other solution has a digit that is wrong
WINDOW = 3


def label(text, positions):
    """The candidates at the positions of one solution.

    A token's loss is its position, a distance a thousandth of it, and those at
    even positions are divergent.
    """
    tokens = np.array([[*map(ord, text), 0]])
    mask, at = np.ones(tokens.shape, bool), np.array([positions])
    written = Trajectories(
        prompt=tokens[:, :1], prompt_mask=mask[:, :1], tokens=tokens,
        mask=mask, logp=np.zeros(tokens.shape), truncated=np.zeros(1, bool),
    )  # fmt: skip
    scored = Scored(
        None, None,
        teacher_token_loss=np.arange(tokens.size, dtype=np.float32)[None],
        candidates=Candidates(at, np.ones(at.shape, bool)),
        distance=at / 1000,
        divergent=at % 2 == 0,
    )  # fmt: skip
    seen = Observed([{"prompt": PROBLEM}], written, [scored])
    labels = seen.labels(Letters(), WINDOW)
    return detectors.label_candidates(seen, labels, window=WINDOW)


def test_candidates_are_held_against_the_truth():
    end = len(RIGHT)
    found = label(RIGHT, [0, end])  # the end is rightly there
    assert not found.fork.any() and not found.window_fork.any()
    np.testing.assert_array_equal(found.loss, [0, end])
    # The mean over the window, as far as the row goes.
    np.testing.assert_allclose(found.future_loss, [1, end], rtol=1e-6)

    wrong = RIGHT[:FORK] + "7" + RIGHT[FORK + 1 :]
    places = [FORK - WINDOW, FORK - WINDOW + 1, FORK, FORK + 1, len(wrong)]
    found = label(wrong, places)
    # What comes after the fork is left out.
    np.testing.assert_array_equal(found.loss, places[:3])
    np.testing.assert_array_equal(found.fork, [0, 0, 1])
    np.testing.assert_array_equal(found.window_fork, [0, 1, 1])
    np.testing.assert_allclose(found.distance, found.loss / 1000)
    np.testing.assert_array_equal(found.divergent, found.loss % 2 == 0)


def test_a_solution_that_ends_early_forks_at_its_end():
    found = label(RIGHT[:5], [2, 5])
    np.testing.assert_array_equal(found.fork, [0, 1])
    np.testing.assert_array_equal(found.window_fork, [0, 1])
