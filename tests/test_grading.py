"""Grading: right and wrong answers, and answers that will not be graded."""

import os
import signal
import sys
import time

import pytest

from topd_jax.evaluation import grading
from topd_jax.evaluation.grading import grade_answers, reference_answer

# As GSM8K writes its answers.
GSM8K = "She sold 48/2 = <<48/2=24>>24 clips, 48+24 = 72 in all.\n#### 72"
ENDLESS = "so it is $9^{9^{9^{9^{9}}}}$"


def record(answer, index=0):
    return {"prompt": "?", "answer": answer, "index": index, "source": "here"}


def test_the_reference_is_what_follows_the_mark():
    assert reference_answer(GSM8K) == "72"
    assert reference_answer(" 1,234 ") == "1,234"
    assert reference_answer("#### 5 #### 6\n") == "6"


@pytest.fixture(scope="module")
def grades():
    """All plain answers, graded by one worker."""
    cases = {
        "in words": (GSM8K, "Natalia sold 72 clips.", True),
        "boxed": (GSM8K, "48 + 24 = \\boxed{72}", True),
        "in dollars": (GSM8K, "The answer is $72$.", True),
        "the last counts": (GSM8K, "Not 71 but 72", True),
        "wrong": (GSM8K, "The answer is 71.", False),
        "wrong after right": (GSM8K, "72 minus 1 is \\boxed{71}", False),
        "no number": (GSM8K, "I cannot say.", False),
        "nothing": (GSM8K, "", False),
        "thousands": ("#### 1,000", "It is $1000$", True),
        "a fraction": ("#### 0.5", "It is $\\frac{1}{2}$", True),
        "negative": ("#### -3", "It is $3$", False),
        "answer alone": ("18", "\\boxed{18}", True),
        "control characters": (GSM8K, "\x00\n\ud800 \\boxed{72}", True),
    }
    records = [record(reference) for reference, _, _ in cases.values()]
    texts = [text for _, text, _ in cases.values()]
    found = grade_answers(records, texts)
    return {
        name: (grade, case[2])
        for (name, case), grade in zip(cases.items(), found, strict=True)
    }


@pytest.mark.parametrize(
    "name",
    ["in words", "boxed", "in dollars", "the last counts", "wrong",
     "wrong after right", "no number", "nothing", "thousands", "a fraction",
     "negative", "answer alone", "control characters"],
)  # fmt: skip
def test_plain_answers(grades, name):
    grade, expected = grades[name]
    assert grade is expected


def test_an_endless_answer_costs_its_deadline_and_no_more(monkeypatch):
    waits = []
    plain = grading._Worker.ask

    def timed(self, *args):
        started = time.perf_counter()
        grade = plain(self, *args)
        waits.append(time.perf_counter() - started)
        return grade

    monkeypatch.setattr(grading._Worker, "ask", timed)
    grades = grade_answers(
        [record("#### 72")] * 3,
        ["$72$", ENDLESS, "$72$"],
        deadline=8.0,
    )
    assert grades == [True, False, True]
    assert waits[1] < 12


def test_a_worker_that_dies_costs_one_answer(monkeypatch):
    plain = grading._Worker.ask
    killed = []

    def ask(self, reference, text, deadline):
        if text == "die":
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            killed.append(self._process.pid)
        return plain(self, reference, text, deadline)

    monkeypatch.setattr(grading._Worker, "ask", ask)
    grades = grade_answers(
        [record("#### 2")] * 3, ["$2$", "die", "$2$"], deadline=60.0
    )
    assert grades == [True, False, True]
    assert len(killed) == 1


def test_no_worker_is_left_behind(monkeypatch):
    started = []
    plain = grading._Worker.__init__

    def init(self):
        plain(self)
        started.append(self._process)

    monkeypatch.setattr(grading._Worker, "__init__", init)
    grade_answers([record("1")], ["1"])
    assert len(started) == 1
    assert started[0].returncode is not None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_a_worker_brings_no_jax_along():
    worker = grading._Worker()
    try:
        with open(f"/proc/{worker._process.pid}/maps") as maps:
            libraries = maps.read()
    finally:
        worker.stop()
    assert "python" in libraries and "jaxlib" not in libraries


def test_without_reference_answers_there_are_no_grades(monkeypatch):
    def forbidden(self):
        raise AssertionError("a worker was started for nothing")

    monkeypatch.setattr(grading._Worker, "__init__", forbidden)
    assert grade_answers([record("1"), record("")], ["1", "2"]) is None
    assert grade_answers([], []) == []


def test_a_worker_that_does_not_start_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="math-verify"):
        grade_answers([record("1")], ["1"])
