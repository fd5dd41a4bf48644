"""``topd eval``: n completions a problem, graded, with their records.

The same sampler and, on the test problems, the same first completion a
problem as the evaluation at the end of a run; every further sample is one
more pass over the problems.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from topd_jax.data.benchmarks import benchmark_name, read_benchmark
from topd_jax.data.prompts import EncodedPrompts, encode_prompts
from topd_jax.data.routing import places_of
from topd_jax.evaluation import comparisons
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.training.config import Settings
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import by_name

# The problems of data.source, where no benchmark is named.
OWN = "test"


def read_all(settings: Settings, pair: Pair) -> dict[str, EncodedPrompts]:
    """The problems that ``topd eval`` takes, before anything is generated.

    Args:
      settings: whose ``eval.benchmarks`` names them; none takes the run's own
        test problems, ``eval.final_problems`` of them.
      pair: of the run.

    Returns:
      name -> problems, in order.

    Raises:
      ValueError: for a benchmark that cannot be read, or two of one name.
    """
    if not settings.eval.benchmarks:
        return {OWN: _first(pair.test, settings.eval.final_problems)}
    found: dict[str, EncodedPrompts] = {}
    for where in settings.eval.benchmarks:
        name = benchmark_name(where)
        if name in found or name == OWN:
            raise ValueError(
                f"eval.benchmarks: {where} is a second benchmark of the name "
                f"{name!r}; give the file another name"
            )
        found[name] = encode_prompts(
            read_benchmark(where, split=settings.data.eval_split),
            pair.tokenizer,
            max_length=settings.data.max_prompt_length,
            on_long_prompt=settings.data.on_long_prompt,
        )
    return found


def run_benchmark(
    evaluator: Evaluator,
    student: Any,
    pair: Pair,
    encoded: EncodedPrompts,
    *,
    samples: int,
    temperature: float,
    grade: Callable,
    final_answer: Callable[[str], str],
) -> dict[str, Any]:
    """Generates, grades and sums up one benchmark.

    Args:
      evaluator: of the run.
      student: the model.
      pair: of the run.
      encoded: the problems.
      samples: completions a problem.
      temperature: of the sampler; 0 is greedy.
      grade: (records, completions) -> bools, or None without answers.
      final_answer: completion -> its answer, for votes.

    Returns:
      JSON-able: "summary" as :func:`topd_jax.evaluation.comparisons.summarise`
      gives
      it, with "skipped" (problems too long to be asked, not counted) and the
      statistics of student against teacher, and with several teachers all of
      it as "name/teacher" of the problems of each; "records", one a problem.
      Without reference answers there are statistics only, and no records.
    """
    count = len(encoded.records)
    # Pass after pass: the first is the evaluation of one sample.
    repeated = dataclasses.replace(
        encoded, records=encoded.records * samples, ids=encoded.ids * samples
    )
    rows, statistics = evaluator.complete(
        student, repeated, count * samples, temperature
    )
    texts = [pair.tokenizer.decode(r) for r in rows]
    grades = grade(repeated.records, texts)
    if grades is None:
        summary = {"problems": count, "samples": samples}
        summary |= {"skipped": encoded.skipped, **statistics}
        return {"summary": summary, "records": []}
    records = [
        {
            "index": record["index"],
            "problem": record["prompt"],
            "reference": record["answer"],
            "right": [bool(g) for g in grades[i::count]],
            "answers": [final_answer(t) for t in texts[i::count]],
            "lengths": [len(r) for r in rows[i::count]],
            "cut": [evaluator.is_cut(r) for r in rows[i::count]],
            "completions": texts[i::count],
        }
        for i, record in enumerate(encoded.records)
    ]
    own = {
        name: comparisons.summarise([records[i] for i in places])
        for name, places in places_of(encoded.records).items()
        if name
    }
    summary = comparisons.summarise(records) | {
        "skipped": encoded.skipped,
        **statistics,
        **by_name(own),
    }
    return {"summary": summary, "records": records}


def evaluate_all(
    settings: Settings, pair: Pair, student: Any, step: int
) -> dict[str, Any]:
    """Evaluates a student on everything that the settings name.

    Args:
      settings: of the evaluation.
      pair: of the run.
      student: the model.
      step: of the student, for the record.

    Returns:
      JSON-able: "step", "temperature", "max_new_tokens" and "benchmarks",
      name -> :func:`run_benchmark`.
    """
    named = read_all(settings, pair)
    evaluator = Evaluator(settings, pair)
    found = {}
    for name, encoded in named.items():
        grade, answer = pair.grade, pair.final_answer
        if name != OWN:  # benchmarks are mathematics, whatever the run is
            from topd_jax.evaluation.grading import final_answer, grade_answers

            grade, answer = grade_answers, final_answer
        found[name] = run_benchmark(
            evaluator,
            student,
            pair,
            encoded,
            samples=settings.eval.samples,
            temperature=settings.eval.temperature,
            grade=grade,
            final_answer=answer,
        )
    return {
        "step": step,
        "temperature": settings.eval.temperature,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "seed": settings.seed,
        "benchmarks": found,
    }


def summaries(result: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without the records of its problems.

    Args:
      result: of :func:`evaluate_all`.
    """
    return result | {
        "benchmarks": {
            name: found["summary"]
            for name, found in result["benchmarks"].items()
        }
    }


def compare_runs(
    a: list[pathlib.Path], b: list[pathlib.Path], which: str
) -> dict[str, Any]:
    """Compares what ``topd eval`` wrote in two runs' directories.

    Args:
      a: work directories of the first method, one a seed.
      b: of the second, as many.
      which: "latest", "best" or "start": the file ``eval-WHICH.json``.

    Returns:
      name -> :func:`topd_jax.evaluation.comparisons.compare`, of every
      benchmark
      that all of them have.

    Raises:
      ValueError: for a missing file, unequal numbers of runs, or runs that
        have not answered the same problems.
    """
    if len(a) != len(b) or not a:
        raise ValueError(
            f"--a names {len(a)} runs and --b {len(b)}; give as many of each, "
            "seed by seed"
        )
    runs = [_read(d / f"eval-{which}.json") for d in (*a, *b)]
    names = [
        n for n in runs[0] if all(n in r and r[n]["records"] for r in runs)
    ]
    if not names:
        raise ValueError(
            "the runs have no graded benchmark in common: "
            + "; ".join(", ".join(r) for r in runs)
        )
    for name in names:
        asked = [[p["problem"] for p in r[name]["records"]] for r in runs]
        if any(other != asked[0] for other in asked):
            raise ValueError(
                f"the runs have not answered the same problems of {name}; "
                "evaluate both with the same data and eval settings"
            )
    records = [{n: r[n]["records"] for n in names} for r in runs]
    return {
        name: comparisons.compare(
            [r[name] for r in records[: len(a)]],
            [r[name] for r in records[len(a) :]],
        )
        for name in names
    }


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no file at {path}; run topd eval there first")
    try:
        return json.loads(path.read_text())["benchmarks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what topd eval writes ({error!r}); run it again"
        ) from error


def _first(encoded: EncodedPrompts, count: int) -> EncodedPrompts:
    return encoded.take(range(min(count, len(encoded.records))))
