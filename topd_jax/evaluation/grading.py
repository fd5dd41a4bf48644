"""Grade completions: a tiny world's, mathematics, and reasoning-gym's.

Mathematics is graded in worker processes: a hostile or endless answer costs
its deadline and one fork of a worker, never the run. An answer is right if its
spelling is the reference's (:func:`topd_jax.evaluation.answers.normal`) or
math-verify proves the two equal. Problems of reasoning-gym are graded there by
its own graders, some of which evaluate an answer as Python.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from topd_jax.data import gym
from topd_jax.data.settings import DataSettings
from topd_jax.data.sources import Record
from topd_jax.data.toy_world import problems
from topd_jax.evaluation.answers import (
    are_orders,
    is_costly,
    normal,
    plain_latex,
    plain_text,
    said,
    stated_answer,
    without_modulus,
)

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
grading._serve(float(sys.argv[2]))
"""
# An answer that nothing announces is near the end, if anywhere.
_TAIL = 2000  # characters
# An answer of words and one number, "18 eggs a day", but no "2x" and no
# "x + 3": read as prose. Other numbers follow words, "18 eggs in 2 days".
_WORDS = r"(?:[^\\^_{}()\[\],=;<>+*×·÷√π|/\d-]|(?<=[A-Za-z])[-/](?=[A-Za-z]))*"
_PROSE = re.compile(
    rf"(?!not?\b){_WORDS}(?<![A-Za-z.])-?(?:\d*\.)?\d+(?:/\d+)?"
    r"(?!a\b|\s?[b-fi-kn-rt-zA-KM-Z](?![A-Za-z.]))"
    r"(?!\s*(?::|(?:and|minus|or|over|plus|times|to)\b))"
    rf"({_WORDS}(?:(?<=[a-z]\s)\d+(?:\.\d+)*{_WORDS})*)"
)


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
    if not all(r["answer"] or "task" in r for r in records):
        return None
    pairs = [
        # GSM8K writes "... #### 72"; others write the answer alone.
        (
            [record["task"], record["index"]]
            if "task" in record
            else record["answer"].rsplit("####", 1)[-1].strip(),
            text,
        )
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
    pairs: Sequence[tuple[str | list, str]], deadline: float
) -> list[bool]:
    """Grade (reference, completion) pairs in one worker at a time.

    The reference of a problem of reasoning-gym is [its task, its place].
    A worker is a separate program: a fork may deadlock with JAX's threads, and
    a spawn runs the caller's main module again.
    """
    grades: list[bool] = []
    while len(grades) < len(pairs):
        rest = (json.dumps(pair) + "\n" for pair in pairs[len(grades) :])
        worker = subprocess.run(
            [sys.executable, "-c", _BEGIN, str(_CHECKOUT), str(deadline)],
            input="".join(rest).encode(),
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is not for it
        )
        started, *lines = worker.stdout.split() or [None]
        if started is None:
            raise ChildProcessError(
                "the grading process does not start; is math-verify "
                "installed? try: python -c 'import math_verify'"
            )
        grades += [line == b"true" for line in lines]
        if len(grades) < len(pairs):  # the next one hung, or killed it
            grades.append(False)
    return grades


def _serve(deadline: float) -> None:
    """Serve as a worker: read [reference, completion] lines, write grades."""
    _end_with_parent()
    # Nothing handles the alarm: it ends the process, even within C code.
    alarm = functools.partial(signal.setitimer, signal.ITIMER_REAL)
    alarm(_START)
    # Libraries that print must not write among the grades.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import math_verify

    logging.disable(logging.CRITICAL)
    # What is loaded at its first use is loaded before any fork.
    _is_right("1", "\\boxed{\\frac{2}{2}}", math_verify)
    lines, graded = sys.stdin.readlines(), 0
    for reference, _ in map(json.loads, lines[:1]):  # all are of one source
        if isinstance(reference, list):
            gym.open_task(reference[0])
    alarm(0)
    print("started", file=answers, flush=True)
    while graded < len(lines):
        # A fork ends with the answer that it cannot grade, and the next one is
        # ready at once: this process has no threads.
        reader, writer = os.pipe()
        if not os.fork():
            _end_with_parent()
            os.close(reader)
            _grade_lines(lines[graded:], writer, deadline, math_verify)
        os.close(writer)
        with os.fdopen(reader) as told:
            grades = told.read().split()
        os.wait()
        graded += len(grades)
        if graded < len(lines):
            grades.append("false")
            graded += 1
        print(*grades, file=answers, flush=True)


def _end_with_parent() -> None:
    """Let this process be killed when the one that began it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _grade_lines(
    lines: Sequence[str], writer: int, deadline: float, math_verify: Any
) -> NoReturn:
    """Write the grade of each line to a pipe, and end this process."""
    # An answer that would fill the machine's memory fails here instead.
    with contextlib.suppress(ValueError):  # the system's limit is lower
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in lines:
        signal.setitimer(signal.ITIMER_REAL, deadline)
        reference, text = json.loads(line)
        try:
            grade = _is_right(reference, text, math_verify)
        except Exception:  # an answer that raises anything is wrong
            grade = False
        os.write(writer, b"true " if grade else b"false ")
    os._exit(0)


def _is_right(reference: str | list, text: str, math_verify: Any) -> bool:
    how, answer = stated_answer(text)
    if isinstance(reference, list):
        return _is_solved(*reference, answer)
    answer, reference = without_modulus(answer, reference)
    # "62.5" answers what percentage it is.
    same = {normal(reference), normal(reference).removesuffix("%")}
    # "120,240" is one number where nothing says otherwise, "120, 240" is two.
    tight, tight_reference = (
        re.sub(r"[\s$]", "", x) for x in (answer, reference)
    )
    alike = normal(answer) in same or tight == tight_reference
    if how in ("boxed", "marked") and alike:
        return True

    # The worker has a deadline: no other alarms here.
    def read(text: str) -> list:
        return math_verify.parse(text, parsing_timeout=None)

    latex = plain_latex(answer)
    if are_orders(latex, plain_latex(reference)):
        return False
    if how in ("boxed", "marked"):
        is_boxed = how == "boxed"
        readings = [f"\\boxed{{{latex}}}" if is_boxed else f"${latex}$"]
        # "(3, 5)" as prose would end with a 5; in a box, 3! is 6 alone, and
        # 5 apples and 3 pears are no 5.
        prose = _PROSE.fullmatch(latex)
        if prose and not (is_boxed and re.search(r"[\d!]", prose[1])):
            readings.append(f"The answer is {latex}")
    else:
        tail = said(text)[-_TAIL:]
        readings = [answer if is_costly(tail) else tail]
    if any(is_costly(reading) for reading in (reference, *readings)):
        return False
    gold = read(f"${plain_latex(reference)}$")

    def is_equal(found: list) -> bool:
        places = _places(gold + found)
        return math_verify.verify(
            gold, found, timeout_seconds=None,
            float_rounding=places, numeric_precision=max(places, 15),
        )  # fmt: skip

    return any(is_equal(read(reading)) for reading in readings)


def _is_solved(task: str, index: int, answer: str) -> bool:
    """Return whether any reading of an answer solves a task's problem."""
    readings = answer.strip(), plain_latex(answer), plain_text(answer)
    for reading in dict.fromkeys(readings):
        # What a task's grader cannot read may be spelled otherwise.
        with contextlib.suppress(Exception):
            if gym.is_right(task, index, reading):
                return True
    return False


def _places(found: Sequence[Any]) -> int:
    """Return how many decimal places decide whether two numbers are equal.

    math-verify's six, but four digits of the smallest number: else all that
    is below a millionth would be one.

    Args:
      found: sympy's expressions of both answers, and their texts.
    """
    places = 6
    for expression in found:
        for part in (expression, *getattr(expression, "args", ())):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                size = math.log10(abs(float(part)))
                places = max(places, 3 - math.floor(size))
    return places
