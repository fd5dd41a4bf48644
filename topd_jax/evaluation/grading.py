"""Grade completions: the tiny world's, and mathematics with math-verify.

Mathematics is graded in worker processes: a hostile or endless answer costs
its deadline and the worker, never the run. An answer is right if its spelling
is the reference's (:func:`topd_jax.evaluation.answers.normal`) or math-verify
proves the two equal.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from topd_jax.data.settings import DataSettings
from topd_jax.data.sources import Record
from topd_jax.data.toy_world import problems
from topd_jax.evaluation.answers import normal, plain_latex, stated_answer

DEADLINE = 10.0  # seconds an answer
_START = 120.0  # seconds a fresh worker may need for its imports
# Fewer answers than this are not worth another process.
_SHARE = 32
_MEMORY = 4 << 30  # bytes that a worker may ask for
# How a worker begins. It imports no JAX, which would be seconds and most of
# the memory of each of them.
_CHECKOUT = pathlib.Path(__file__).parents[2]
_BEGIN = """
import sys
sys.path.insert(0, sys.argv[1])
from topd_jax.evaluation import grading
grading._serve()
"""
# An answer that nothing announces is near the end, if anywhere.
_TAIL = 2000  # characters
# An answer of words and one number, "18 eggs a day": read as prose.
_PROSE = re.compile(r"[^\\^_{}()\[\],=;]*")


@dataclasses.dataclass(frozen=True)
class Grader:
    """How completions are graded.

    Attributes:
      grade: (records, completions) -> which are right, or None where answers
        are not known.
      final_answer: completion -> the answer it gives, for votes; "" for none.
    """

    grade: Callable[[Sequence[Record], Sequence[str]], list[bool] | None]
    final_answer: Callable[[str], str]


def make_grader(data: DataSettings) -> Grader:
    """Return the grader of a run's prompts.

    Args:
      data: whose ``source`` says what they are.
    """
    if data.source != "world":
        return math_grader()

    def grade(records: Sequence[Record], texts: Sequence[str]) -> list[bool]:
        return [
            problems.is_correct(record["prompt"], text)
            for record, text in zip(records, texts, strict=True)
        ]

    return Grader(grade, lambda text: problems.final_answer(text) or "")


def math_grader() -> Grader:
    """Return the grader of mathematical answers."""
    return Grader(grade_answers, final_answer)


def reference_answer(text: str) -> str:
    """Return the final answer of a reference solution.

    Args:
      text: "... #### 72" as GSM8K writes it, or the answer alone.

    Returns:
      What follows the last "####"; the whole text where there is none.
    """
    return text.rsplit("####", 1)[-1].strip()


def final_answer(text: str) -> str:
    """Return the answer that a completion gives, in one spelling.

    Args:
      text: the completion.

    Returns:
      A key that most spellings of one answer share; "" for none.
    """
    return normal(stated_answer(text)[1])


def grade_answers(
    records: Sequence[Record],
    texts: Sequence[str],
    *,
    deadline: float = DEADLINE,
) -> list[bool] | None:
    """Grade completions against reference answers.

    One worker process per core, where there are enough answers.

    Args:
      records: questions with their reference answers.
      texts: one completion a record.
      deadline: seconds an answer; one that takes longer is wrong.

    Returns:
      bool a record; None where some record has no reference answer.

    Raises:
      ChildProcessError: where the grading process does not start.
    """
    if not all(r["answer"] for r in records):
        return None
    pairs = [
        (reference_answer(record["answer"]), text)
        for record, text in zip(records, texts, strict=True)
    ]
    if not pairs:
        return []
    workers = min(os.cpu_count() or 1, -(-len(pairs) // _SHARE))
    grades = [False] * len(pairs)
    with ThreadPoolExecutor(workers) as pool:
        parts = [slice(i, None, workers) for i in range(workers)]
        graded = pool.map(lambda s: _grade_part(pairs[s], deadline), parts)
        for part, grades_of_part in zip(parts, graded, strict=True):
            grades[part] = grades_of_part
    return grades


def _grade_part(
    pairs: Sequence[tuple[str, str]], deadline: float
) -> list[bool]:
    """Grade (reference, completion) pairs in one worker at a time."""
    worker = None
    grades = []
    try:
        for reference, text in pairs:
            worker = worker or _Worker()
            grade = worker.ask(reference, text, deadline)
            if grade is None:  # it hangs or died: start another one
                worker.stop()
                worker = None
            grades.append(bool(grade))
    finally:
        if worker is not None:
            worker.stop()
    return grades


class _Worker:
    """A process that grades one answer at a time, a JSON line each way.

    A separate program: a fork may deadlock with JAX's threads, and a spawn
    runs the caller's main module again.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, str(_CHECKOUT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._answer(_START) is not True:
            self.stop()
            raise ChildProcessError(
                "the grading process does not start; is math-verify "
                "installed? try: python -c 'import math_verify'"
            )

    def ask(self, reference: str, text: str, deadline: float) -> bool | None:
        """Return the grade; None where none came in time."""
        line = json.dumps([reference, text]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            return None
        return self._answer(deadline)

    def _answer(self, seconds: float) -> bool | None:
        # The worker writes short lines whole: what is readable is a line.
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # a dead worker leaves input unread
            self._process.stdin.close()
        self._process.stdout.close()


def _serve() -> None:
    """Serve as the worker: read [reference, completion], write a grade."""
    # Libraries that print must not write among the grades.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import math_verify

    logging.disable(logging.CRITICAL)
    # An answer that would fill the machine's memory fails here instead.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        reference, text = json.loads(line)
        try:
            grade = _is_right(reference, text, math_verify)
        except Exception:  # an answer that raises anything is wrong
            grade = False
        print(json.dumps(grade), file=answers, flush=True)


def _is_right(reference: str, text: str, math_verify: Any) -> bool:
    how, answer = stated_answer(text)
    # "62.5" answers what percentage it is.
    same = {normal(reference), normal(reference).removesuffix("%")}
    if how in ("boxed", "marked") and normal(answer) in same:
        return True

    # The parent has the deadline: no alarms here.
    def read(text: str) -> list:
        return math_verify.parse(text, parsing_timeout=None)

    gold = read(f"${plain_latex(reference)}$")
    latex = plain_latex(answer)
    if how == "boxed":
        readings = [f"\\boxed{{{latex}}}"]
    elif how == "marked":
        readings = [f"${latex}$"]
        # "(3, 5)" as prose would end with a 5.
        if _PROSE.fullmatch(latex):
            readings.append(f"The answer is {latex}")
    else:
        readings = [text[-_TAIL:]]
    return _any_equal(gold, map(read, readings), math_verify.verify)


def _any_equal(gold: list, found: Any, verify: Callable) -> bool:
    return any(verify(gold, f, timeout_seconds=None) for f in found)
