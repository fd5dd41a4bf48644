"""Evaluation: which problems count, and what is said of them."""

import dataclasses

import jax
import numpy as np
import pytest
from small_run import settings_with

from topd_jax.evaluation.comparisons import unpack_grades
from topd_jax.evaluation.evaluator import compare
from topd_jax.evaluation.metrics import read_metrics


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, eval__problems=7, eval__final_problems=9,
        eval__batch_size=4,
    )  # fmt: skip


class Watched:
    """An evaluator that keeps what it wrote and graded."""

    def __init__(self, settings, setup):
        plain = setup.evaluator(settings)
        self.mesh, self.written, self.graded = setup.mesh, [], []
        self.answers = True

        def grade(records, texts):
            self.graded.append((records, texts))
            return [r["index"] != 0 for r in records] if self.answers else None

        def writer(*arguments):
            self.written.append(plain.writer(*arguments))
            return self.written[-1]

        self.evaluator = dataclasses.replace(plain, grade=grade)
        vars(self.evaluator)["writer"] = writer

    def __call__(self, student, step=0, **options):
        self.graded.clear()
        self.written.clear()
        with jax.set_mesh(self.mesh):
            return self.evaluator.evaluate(student, step, **options)


@pytest.fixture(scope="module")
def watched(settings, setup):
    return Watched(settings, setup)


def test_every_problem_counts_once_and_fillers_never(watched, setup):
    row, kept = watched(setup.student, 3)
    assert kept == []
    ((records, texts),) = watched.graded
    assert [r["index"] for r in records] == list(range(7))
    assert [w.tokens.shape[0] for w in watched.written] == [4, 4]
    rows = jax.tree.map(
        lambda *parts: np.concatenate(parts)[:7], *watched.written
    )
    look = jax.jit(compare, static_argnames="top_k")
    expected = look(setup.student, setup.teachers[0].model, rows, top_k=16)
    for name, value in read_metrics(expected).items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert (row["step"], row["final"], row["problems"]) == (3, False, 7)
    tokens = [rows.tokens[i][rows.mask[i]] for i in range(7)]
    assert texts == [setup.tokenizer.decode(t.tolist()) for t in tokens]
    assert row["length_mean"] == pytest.approx(np.mean([*map(len, tokens)]))
    ends = setup.tokenizer.eos_ids
    assert row["truncated"] == np.mean([t[-1] not in ends for t in tokens]) > 0
    assert watched(setup.student, 3)[0] == row  # the same numbers again


def test_grades_become_accuracy_interval_and_bits(watched, setup):
    row, _ = watched(setup.student)
    assert (row["correct"], row["exact_match"]) == (6, 6 / 7)
    # 6 of 7: Newcombe, 1998, method 3 (Wilson).
    interval = row["exact_match_low"], row["exact_match_high"]
    assert interval == pytest.approx((0.4869, 0.9743), abs=1e-4)
    assert unpack_grades(row).tolist() == [False] + [True] * 6
    watched.answers = False
    row, kept = watched(setup.student, keep=1)
    watched.answers = True
    assert row["exact_match"] is None and kept[0]["right"] is None
    assert "grades" not in row and "exact_match_low" not in row
    assert row["reverse_kl"] > 0


def test_the_end_takes_the_test_problems_and_keeps_the_first(watched, setup):
    row, kept = watched(setup.student, 6, final=True, keep=2)
    ((records, texts),) = watched.graded
    assert (row["final"], row["problems"]) == (True, 9)
    assert records == setup.test.records
    shared = {r["prompt"] for r in setup.validation.records} & {
        r["prompt"] for r in setup.test.records
    }
    assert not shared
    for i, problem in enumerate(kept):
        assert problem == {
            "step": 6, "final": True, "problem": records[i]["prompt"],
            "answer": records[i]["answer"], "completion": texts[i],
            "right": i == 1, "truncated": problem["truncated"],
        }  # fmt: skip
    assert len(kept) == 2
    everything = watched(setup.student, 6, final=True, keep=99)[1]
    assert len(everything) == 9
    assert np.mean([p["truncated"] for p in everything]) == row["truncated"]


def test_temperature_zero_is_greedy(watched, setup, monkeypatch):
    first, _ = watched(setup.student, temperature=0.0)
    written = [np.asarray(r.tokens) for r in watched.written]
    sampled, _ = watched(setup.student)
    assert sampled["student_nll"] > first["student_nll"] + 0.1
    assert sampled["temperature"] == 1.0
    evaluator = dataclasses.replace(watched.evaluator, seed=99)
    vars(evaluator)["writer"] = watched.evaluator.writer
    monkeypatch.setattr(watched, "evaluator", evaluator)
    again, _ = watched(setup.student, temperature=0.0)  # needs no noise
    assert first == again
    for a, b in zip(written, watched.written, strict=True):
        np.testing.assert_array_equal(a, b.tokens)


def test_slots_change_no_completion(watched, setup, monkeypatch):
    """Four rows in three slots, compared three at a time."""
    plain, kept = watched(setup.student, keep=7)
    options = dataclasses.replace(watched.evaluator.rollout, slots=3)
    evaluator = dataclasses.replace(watched.evaluator, rollout=options)
    monkeypatch.setattr(watched, "evaluator", evaluator)
    row, same = watched(setup.student, keep=7)
    assert same == kept
    for name, value in plain.items():
        near = isinstance(value, float)
        wanted = pytest.approx(value, rel=1e-4, abs=1e-6) if near else value
        assert row[name] == wanted, name
