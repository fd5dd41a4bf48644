"""Grading of mathematical answers with math-verify, in a process of its own.

A hostile or endless answer costs its deadline and the worker, never the run.
"""

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Sequence

from topd_jax.data.sources import Record

DEADLINE = 10.0  # seconds an answer
_START = 120.0  # seconds a fresh worker may need for its imports


def reference_answer(text: str) -> str:
    """The final answer of a reference solution.

    Args:
      text: "... #### 72" as GSM8K writes it, or the answer alone.

    Returns:
      What follows the last "####"; the whole text where there is none.
    """
    return text.rsplit("####", 1)[-1].strip()


def grade_answers(
    records: Sequence[Record],
    texts: Sequence[str],
    *,
    deadline: float = DEADLINE,
) -> list[bool] | None:
    """Which completions end with the right answer.

    Args:
      records: questions with their reference answers.
      texts: one completion a record.
      deadline: seconds an answer; what takes longer is wrong.

    Returns:
      bool a record; None where some record has no reference answer.

    Raises:
      ChildProcessError: where the grading process does not start at all.
    """
    if not all(r["answer"] for r in records):
        return None
    worker = None
    grades = []
    try:
        for record, text in zip(records, texts, strict=True):
            worker = worker or _Worker()
            grade = worker.ask(
                reference_answer(record["answer"]), text, deadline
            )
            if grade is None:  # it hangs or died: the next one gets a new one
                worker.stop()
                worker = None
            grades.append(bool(grade))
    finally:
        if worker is not None:
            worker.stop()
    return grades


class _Worker:
    """A process that grades one answer at a time, a JSON line each way.

    A program of its own, not a fork (JAX's threads may deadlock in one) nor
    a spawn (which runs the caller's main module again).
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "topd_jax.grading"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._answer(_START) is not True:
            self.stop()
            raise ChildProcessError(
                "the grading process does not start; is math-verify "
                "installed? try: python -m topd_jax.grading"
            )

    def ask(self, reference: str, text: str, deadline: float) -> bool | None:
        """The grade; None where none came in time."""
        line = json.dumps([reference, text]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            return None
        return self._answer(deadline)

    def _answer(self, seconds: float) -> bool | None:
        # The worker writes whole short lines, so what is readable is a line.
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what a dead worker did not read
            self._process.stdin.close()
        self._process.stdout.close()


def _serve() -> None:
    """The worker: reads [reference, completion], writes true or false."""
    # What the libraries print must not pass for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        reference, text = json.loads(line)
        try:
            # The deadline is the parent's: no alarms in here.
            gold = parse(f"${reference}$", parsing_timeout=None)
            found = parse(text, parsing_timeout=None)
            grade = bool(verify(gold, found, timeout_seconds=None))
        except Exception:  # whatever an answer provokes, it is not right
            grade = False
        print(json.dumps(grade), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
