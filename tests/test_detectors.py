"""The detector against the truth: AUC, rates, and candidates by hand."""

import jax
import numpy as np
import pytest

from topd_jax.data.toy_world import truth
from topd_jax.experiments import detectors
from topd_jax.experiments.detectors import LabeledCandidates, auc
from topd_jax.types import Candidates, Scored, Trajectories


def brute_auc(score, positive):
    pairs = [
        (s > t) + 0.5 * (s == t)
        for s in score[positive]
        for t in score[~positive]
    ]
    return np.mean(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 6, 40).astype(np.float32)  # many ties
    positive = rng.random(40) < 0.3
    assert auc(score, positive) == pytest.approx(brute_auc(score, positive))


def test_auc_by_hand():
    score = np.array([1.0, 2.0, 3.0, 4.0])
    assert auc(score, np.array([False, False, True, True])) == 1
    assert auc(score, np.array([True, True, False, False])) == 0
    assert auc(np.ones(4), np.array([True, False, True, False])) == 0.5
    assert auc(score, np.ones(4, bool)) is None
    assert auc(score, np.zeros(4, bool)) is None
    assert auc(np.zeros(0), np.zeros(0, bool)) is None


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
WINDOW = 3


@pytest.fixture(scope="module")
def texts():
    """A correct solution, one with a wrong digit, and where it is."""
    right = "= 3+20= 23#23."
    wrong, at = "= 3+20= 27#23.", 9
    assert truth.fork_index(PROBLEM, [*right, None]) is None
    assert truth.fork_index(PROBLEM, [*wrong, None]) == at
    return right, wrong, at


def as_rows(texts, candidates):
    """Trajectories and annotations of rows with given candidates."""
    width = max(map(len, texts)) + 1
    tokens = np.zeros((len(texts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = [ord(c) for c in text]
        mask[row, : len(text) + 1] = True
    slots = max(map(len, candidates))
    positions = np.zeros((len(texts), slots), np.int32)
    used = np.zeros(positions.shape, bool)
    for row, found in enumerate(candidates):
        positions[row, : len(found)] = found
        used[row, : len(found)] = True
    column = np.arange(width, dtype=np.float32)
    row = 100 * np.arange(len(texts), dtype=np.float32)[:, None]
    return (
        Trajectories(
            prompt=np.zeros((len(texts), 1), np.int32),
            prompt_mask=np.ones((len(texts), 1), bool),
            tokens=tokens,
            mask=mask,
            logp=np.zeros(tokens.shape, np.float32),
            truncated=np.zeros(len(texts), bool),
        ),
        Scored(
            teacher_head=None,
            teacher_hidden=None,
            teacher_token_loss=row + column,
            candidates=Candidates(positions=positions, mask=used),
            distance=(row + positions) / 1000,
            divergent=positions % 2 == 0,
        ),
    )


def test_candidates_are_held_against_the_truth(texts):
    right, wrong, fork = texts
    places = [
        [0, len(right)],  # the second is the end, rightly there
        [fork - WINDOW, fork - WINDOW + 1, fork, fork + 1, len(wrong)],
    ]
    rows, scored = as_rows([right, wrong], places)
    found = detectors.label_candidates(
        [PROBLEM] * 2, rows, scored, Letters(), window=WINDOW
    )
    kept = [0, len(right), fork - WINDOW, fork - WINDOW + 1, fork]
    of_row = [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.fork, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(found.window_fork, [0, 0, 0, 1, 1])
    expected = np.array(of_row) * 100 + np.array(kept)
    np.testing.assert_allclose(found.loss, expected)
    # The mean over the window, as far as the row goes.
    ends = [len(right), len(wrong)]
    lengths = [
        min(WINDOW, ends[row] + 1 - at)
        for row, at in zip(of_row, kept, strict=True)
    ]
    mean = expected + (np.array(lengths) - 1) / 2
    np.testing.assert_allclose(found.future_loss, mean, rtol=1e-6)
    np.testing.assert_allclose(found.distance, expected / 1000)
    np.testing.assert_array_equal(found.divergent, np.array(kept) % 2 == 0)


def test_a_solution_that_ends_early_forks_at_its_end(texts):
    right, _, _ = texts
    cut = right[:5]
    rows, scored = as_rows([cut], [[2, 5]])
    found = detectors.label_candidates(
        [PROBLEM], rows, scored, Letters(), window=WINDOW
    )
    np.testing.assert_array_equal(found.fork, [0, 1])
    np.testing.assert_array_equal(found.window_fork, [0, 1])
