"""Evaluation: which problems count, and what is said of them."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import binomtest
from small_run import small_config

from topd_jax.data.toy_world import truth
from topd_jax.evaluation.evaluator import Evaluator, wilson
from topd_jax.experiments.report import grades_of
from topd_jax.training.config import settings_from
from topd_jax.training.logging import merge, read_metrics
from topd_jax.training.setup import load_pair


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single
        # proportion", 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_by_the_book(correct, total, low, high):
    found = wilson(correct, total)
    assert found == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson(total - correct, total)
    assert mirrored == pytest.approx((1 - found[1], 1 - found[0]))
    peer = binomtest(correct, total).proportion_ci(method="wilson")
    assert found == pytest.approx((peer.low, peer.high), abs=1e-6)


@pytest.fixture(scope="module")
def settings(world_cache):
    config = small_config()
    config.world.cache = str(world_cache)
    config.eval.problems = 7
    config.eval.final_problems = 9
    config.eval.batch_size = 4
    return settings_from(config)


@pytest.fixture(scope="module")
def pair(settings, tmp_path_factory):
    return load_pair(settings, tmp_path_factory.mktemp("pair"))


class Watched:
    """An evaluator that keeps what it wrote and graded."""

    def __init__(self, settings, pair, grade=None):
        self.graded, self.written = [], []

        def asked(records, texts):
            self.graded.append((records, texts))
            return grade(records) if grade else pair.grade(records, texts)

        self.pair = dataclasses.replace(pair, grade=asked)
        self.evaluator = Evaluator(settings, self.pair)
        plain = self.evaluator._write

        def write(*args):
            self.written.append(plain(*args))
            return self.written[-1]

        self.evaluator._write = write

    def __call__(self, *args, **kwargs):
        self.graded.clear()
        self.written.clear()
        with jax.set_mesh(self.pair.mesh):
            return self.evaluator(*args, **kwargs)


@pytest.fixture(scope="module")
def watched(settings, pair):
    return Watched(settings, pair, lambda rs: [r["index"] != 0 for r in rs])


def test_every_problem_counts_once_and_fillers_never(watched, pair, settings):
    row = watched(pair.student, 3)
    ((records, texts),) = watched.graded
    assert [r["index"] for r in records] == list(range(7))
    assert len(watched.written) == 2
    parts, lengths = [], []
    for rows, real in zip(watched.written, (4, 3), strict=True):
        assert rows.tokens.shape[0] == 4
        cut = jax.tree.map(lambda x, n=real: x[:n], rows)
        lengths += cut.mask.sum(1).tolist()
        parts.append(
            watched.evaluator._statistics(pair.student, pair.teacher, cut)
        )
    for name, value in read_metrics(merge(parts)).items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert row["step"] == 3 and row["final"] is False
    assert row["problems"] == 7
    assert row["length_mean"] == pytest.approx(np.mean(lengths))
    decoded = [
        pair.tokenizer.decode(rows.tokens[i][rows.mask[i]].tolist())
        for rows in watched.written
        for i in range(4)
    ]
    assert texts == decoded[:7]


def test_grades_become_accuracy_interval_and_bits(watched, pair):
    row = watched(pair.student, 0)
    assert row["correct"] == 6
    assert row["exact_match"] == 6 / 7
    assert (row["exact_match_low"], row["exact_match_high"]) == wilson(6, 7)
    assert grades_of(row).tolist() == [False] + [True] * 6


def test_the_end_takes_the_test_problems(watched, pair):
    row = watched(pair.student, 6, final=True)
    ((records, _),) = watched.graded
    assert row["final"] is True
    assert row["problems"] == 9
    assert records == pair.test.records
    shared = {r["prompt"] for r in pair.validation.records} & {
        r["prompt"] for r in pair.test.records
    }
    assert not shared


def test_the_same_student_gets_the_same_numbers(watched, pair):
    assert watched(pair.student, 1) == watched(pair.student, 1)


def test_temperature_zero_is_greedy(watched, pair):
    first = watched(pair.student, 1, temperature=0.0)
    written = [np.asarray(r.tokens) for r in watched.written]
    watched.evaluator._key = jax.random.key(99)  # greedy needs no noise
    again = watched(pair.student, 1, temperature=0.0)
    assert first == again
    for a, b in zip(written, watched.written, strict=True):
        np.testing.assert_array_equal(a, b.tokens)
    sampled = watched(pair.student, 1)
    assert sampled["student_nll"] > first["student_nll"] + 0.1
    assert sampled["temperature"] == 1.0


def test_a_student_that_is_the_teacher_is_nowhere_apart(watched, pair):
    row = watched(pair.teacher, 0)
    assert abs(row["reverse_kl"]) < 1e-6
    assert row["top_k_overlap"] == 1.0


def test_cut_off_completions_are_told(watched, pair):
    row = watched(pair.student, 0)
    cut = []
    for rows in watched.written:
        ended = (rows.tokens == pair.tokenizer.eos_ids[0]) & rows.mask
        cut += (~np.asarray(ended.any(1))).tolist()
    assert row["truncated"] == np.mean(cut[:7])
    assert 0 < row["truncated"] <= 1


def test_without_answers_there_is_no_accuracy(settings, pair):
    row = Watched(settings, pair, lambda records: None)(pair.student, 0)
    assert row["exact_match"] is None
    assert "grades" not in row and "exact_match_low" not in row
    assert row["reverse_kl"] > 0


def test_the_worlds_own_grading_is_asked(pair):
    records = pair.test.records[:2]
    right = [truth.PrefixChecker(r["prompt"]).completion() for r in records]
    assert pair.grade(records, right) == [True, True]
    assert pair.grade(records, right[::-1]) == [
        a["answer"] == b["answer"]
        for a, b in zip(records, records[::-1], strict=True)
    ]


def test_the_first_problems_are_written_down_as_graded(watched, pair):
    watched.graded.clear()
    with jax.set_mesh(pair.mesh):
        row, kept = watched.evaluator.write_down(
            pair.student, 3, final=True, keep=2
        )
    ((records, texts),) = watched.graded
    assert row["problems"] == 9 and len(kept) == 2
    for i, told in enumerate(kept):
        assert told == {
            "step": 3,
            "final": True,
            "problem": records[i]["prompt"],
            "answer": records[i]["answer"],
            "completion": texts[i],
            "right": i == 1,
            "truncated": told["truncated"],
        }
    everything = watched.evaluator.write_down(
        pair.student, 3, final=True, keep=99
    )[1]
    assert len(everything) == 9
    cut = np.mean([told["truncated"] for told in everything])
    assert cut == row["truncated"]
