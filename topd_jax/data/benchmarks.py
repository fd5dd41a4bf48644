"""Problems to evaluate on: files and datasets as others publish them (ours).

A benchmark is a JSONL file, or a dataset of TFDS or the hub, with a problem
and its reference answer in every record.
"""

import pathlib

from topd_jax.data.sources import Record, read_hub, read_jsonl, read_tfds

# What published benchmarks call the problem, in the order they are tried.
FIELDS = ("problem", "question")


def benchmark_name(where: str) -> str:
    """A short name: "math500" of "data/math500.jsonl"; the last part of it.

    Args:
      where: as :func:`read_benchmark` takes it.
    """
    kind, _, name = where.rpartition(":")
    return name if kind in ("tfds", "hub") else pathlib.Path(where).stem


def read_benchmark(where: str, *, split: str = "test") -> list[Record]:
    """Reads a benchmark.

    Args:
      where: path of a JSONL file with "problem" or "question", and "answer",
        in every line; or "tfds:NAME" or "hub:OWNER/NAME".
      split: of the dataset; a file has none.

    Returns:
      Its problems, in order, every one with a reference answer.

    Raises:
      ValueError: where it cannot be read, or a record lacks the problem or
        the answer.
    """
    failed = None
    for field in FIELDS:
        try:
            records = _read(where, split, field)
        except ValueError as error:
            failed = failed or error
            continue
        _require_answers(records)
        return records
    raise ValueError(
        f"eval.benchmarks: {failed}; a benchmark is a JSONL file whose lines "
        'have "problem" or "question" and "answer", or tfds:NAME or hub:NAME'
    ) from failed


def _read(where: str, split: str, field: str) -> list[Record]:
    kind, _, name = where.partition(":")
    if kind == "tfds":
        return read_tfds(name, split=split, prompt_field=field)
    if kind == "hub":
        return read_hub(name, split=split, prompt_field=field)
    return read_jsonl(where, prompt_field=field)


def _require_answers(records: list[Record]) -> None:
    for record in records:
        if not record["answer"]:
            raise ValueError(
                f'{record["source"]} has nothing in the field "answer"; an '
                "evaluation needs every reference answer"
            )
