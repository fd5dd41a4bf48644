"""``topd eval``: n completions a problem, graded, with their records.

The sampler and, on the test problems, the first completion of each problem
are those of the evaluation at the end of a run; every further sample is one
more pass over the problems.
"""

import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from topd_jax.data.prompts import EncodedPrompts, encode_prompts
from topd_jax.data.routing import places_of
from topd_jax.data.settings import DataSettings
from topd_jax.data.sources import Fields, Record, read_source
from topd_jax.data.teachers import by_name
from topd_jax.evaluation import comparisons
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.evaluation.grading import Grader, make_grader, math_grader
from topd_jax.evaluation.settings import EvalSettings
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.hosts import from_first
from topd_jax.settings import parse_json

# The problems of data.source, where no benchmark is named.
TEST = "test"
# Of published benchmarks.
_FIELDS = Fields(("problem", "question"))


def read_benchmark(
    where: str, *, split: str = "test"
) -> tuple[str, list[Record]]:
    """Read a benchmark.

    Args:
      where: path of a JSONL file with "problem" or "question", and "answer",
        in every line; or "tfds:NAME", "hub:OWNER/NAME" or
        "reasoning_gym:TASK".
      split: of the dataset; a file has none.

    Returns:
      (its short name, "math500" of "data/math500.jsonl"; its problems, in
      order, every one with a reference answer or a grader of its own).

    Raises:
      ValueError: where it cannot be read, or a record lacks the problem or
        the answer.
    """
    source, _, path = where.partition(":")
    name = path
    if source not in ("tfds", "hub", "reasoning_gym"):
        source, path, name = "jsonl", where, pathlib.Path(where).stem
    try:
        records = read_source(source, path, split, _FIELDS)
    except ValueError as error:
        raise ValueError(
            f"eval.benchmarks: {error}; a benchmark is a JSONL file whose "
            'lines have "problem" or "question" and "answer", or tfds:NAME, '
            "hub:NAME or reasoning_gym:TASK"
        ) from error
    for record in records:
        if not (record["answer"] or "task" in record):
            raise ValueError(
                f'{record["source"]} has nothing in the field "answer"; '
                "an evaluation needs every reference answer"
            )
    return name, records


def read_benchmarks(
    places: Sequence[str], *, split: str = "test"
) -> dict[str, list[Record]]:
    """Read all benchmarks, before models are loaded.

    Args:
      places: of each, as :func:`read_benchmark` takes it.
      split: of the datasets.

    Returns:
      name -> problems, in order.

    Raises:
      ValueError: for a benchmark that cannot be read, or two of one name.
    """
    benchmarks: dict[str, list[Record]] = {}
    for where in places:
        name, records = read_benchmark(where, split=split)
        if name in benchmarks or name == TEST:
            raise ValueError(
                f"eval.benchmarks: {where} is a second benchmark of the name "
                f"{name!r}; give the file another name"
            )
        benchmarks[name] = records
    return benchmarks


def evaluate_all(
    evaluator: Evaluator,
    student: LanguageModel,
    data: DataSettings,
    step: int,
    *,
    benchmarks: Mapping[str, list[Record]] = types.MappingProxyType({}),
    done: Mapping[str, Any] = types.MappingProxyType({}),
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate a student on the benchmarks, or on its own test problems.

    Args:
      evaluator: of the run.
      student: the model.
      data: of the run; says how its own problems are graded. Benchmarks are
        mathematics, but those of reasoning-gym, which grades them itself.
      step: of the student, for the record.
      benchmarks: as :func:`read_benchmarks` returns them; none takes the run's
        test problems, ``eval.final_problems`` of them.
      done: benchmarks that need not be run again, as returned; those that are
        not asked for are returned too.
      keep: given what is returned, as far as it is known, after each of
        several benchmarks.

    Returns:
      JSON-able: "step", "temperature", "max_new_tokens" and "benchmarks",
      name -> :func:`run_benchmark`.
    """
    options: EvalSettings = evaluator.options
    if benchmarks:
        grader = math_grader()
        asked = {
            name: encode_prompts(
                records,
                evaluator.tokenizer,
                max_length=data.max_prompt_length,
                on_long_prompt=data.on_long_prompt,
            )
            for name, records in benchmarks.items()
        }
    else:
        grader, count = make_grader(data), options.final_problems
        places = range(len(evaluator.test.ids))[:count]
        asked = {TEST: evaluator.test.take(places)}
    evaluation = {
        "step": step,
        "temperature": options.temperature,
        "max_new_tokens": evaluator.rollout.max_new_tokens,
        "benchmarks": {n: b for n, b in done.items() if n not in asked},
    }
    for name, encoded in asked.items():
        if evaluation["benchmarks"]:
            keep(evaluation)
        evaluation["benchmarks"][name] = done.get(name) or run_benchmark(
            evaluator, student, encoded, grader
        )
    return evaluation


def run_benchmark(
    evaluator: Evaluator,
    student: LanguageModel,
    encoded: EncodedPrompts,
    grader: Grader,
) -> dict[str, Any]:
    """Generate, grade and summarize one benchmark.

    Args:
      evaluator: of the run; its options say how many completions a problem,
        and their temperature.
      student: the model.
      encoded: the problems.
      grader: of the completions.

    Returns:
      JSON-able: "summary" as
      :func:`~topd_jax.evaluation.comparisons.summarize` gives it, with
      "skipped" (problems too long to be asked, not counted) and the statistics
      of student against teacher, and with several teachers all of it as
      "name/teacher" of the problems of each; "records", one a problem. Without
      reference answers there are statistics only, and no records.
    """
    count, samples = len(encoded.records), evaluator.options.samples
    # Pass after pass: the first is the evaluation of one sample.
    repeated = encoded.take([*range(count)] * samples)
    rows, statistics = evaluator.complete(
        student, repeated, count * samples, evaluator.options.temperature
    )
    texts = [evaluator.tokenizer.decode(r) for r in rows]
    grades = from_first(lambda: grader.grade(repeated.records, texts))
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
            "answers": [grader.final_answer(t) for t in texts[i::count]],
            "lengths": [len(r) for r in rows[i::count]],
            "cut": [evaluator.is_cut(r) for r in rows[i::count]],
            "completions": texts[i::count],
        }
        for i, record in enumerate(encoded.records)
    ]
    by_teacher = {
        name: comparisons.summarize([records[i] for i in places])
        for name, places in places_of(encoded.records).items()
        if name
    }
    summary = comparisons.summarize(records) | {
        "skipped": encoded.skipped,
        **statistics,
        **by_name(by_teacher),
    }
    return {"summary": summary, "records": records}


def summaries(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation without the records of its problems.

    Args:
      evaluation: of :func:`evaluate_all`.
    """
    return evaluation | {
        "benchmarks": {
            name: benchmark["summary"]
            for name, benchmark in evaluation["benchmarks"].items()
        }
    }


def compare_runs(
    a: list[pathlib.Path], b: list[pathlib.Path], which: str
) -> dict[str, Any]:
    """Compare what ``topd eval`` wrote in two runs' directories.

    Args:
      a: work directories of the first method, one a seed.
      b: of the second, as many.
      which: "latest", "best" or "start": the file ``eval-WHICH.json``.

    Returns:
      name -> :func:`topd_jax.evaluation.comparisons.compare`, of every
      benchmark that all of them have.

    Raises:
      ValueError: for a missing file, unequal numbers of runs, runs that have
        not answered the same problems in the same way, or whose seeds are no
        pairs.
    """
    if len(a) != len(b) or not a:
        raise ValueError(
            f"--a names {len(a)} runs and --b {len(b)}; give as many of each, "
            "seed by seed"
        )
    runs, how, seeds = zip(
        *(_read(d / f"eval-{which}.json") for d in (*a, *b)), strict=True
    )
    if any(one != how[0] for one in how):
        raise ValueError(
            "the runs were not evaluated alike: "
            f"{'; '.join(map(str, how))}; run topd eval with the same settings"
        )
    of_a, of_b = seeds[: len(a)], seeds[len(a) :]
    # Of one run problems are resampled alone, and it is a pair with any.
    if len(a) > 1 and (of_a != of_b or len(set(of_a)) < len(a)):
        raise ValueError(
            f"the runs of --a have config.seed {of_a} and those of --b {of_b}; "
            "both must name runs of the same seeds in the same order, each "
            "seed once"
        )
    names = [
        n for n in runs[0] if all(n in r and r[n]["records"] for r in runs)
    ]
    if not names:
        raise ValueError(
            "the runs have no graded benchmark in common: "
            + "; ".join(", ".join(r) for r in runs)
        )
    for name in names:
        asked = [
            [
                (p["problem"], p.get("reference"), len(p["right"]))
                for p in r[name]["records"]
            ]
            for r in runs
        ]
        if any(other != asked[0] for other in asked):
            raise ValueError(
                f"the runs have not answered the same problems of {name} "
                "equally often; evaluate both with the same data and eval "
                "settings"
            )
    return {
        name: comparisons.compare(
            [r[name]["records"] for r in runs[: len(a)]],
            [r[name]["records"] for r in runs[len(a) :]],
        )
        for name in names
    }


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return benchmarks of an evaluation, how it was sampled, and its seed."""
    if not path.is_file():
        raise ValueError(f"no file at {path}; run topd eval there first")
    try:
        file = parse_json(path.read_bytes(), path.name)
        how = {key: file[key] for key in ("temperature", "max_new_tokens")}
        return file["benchmarks"], how, file["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what topd eval writes ({error!r}); run it again"
        ) from error
