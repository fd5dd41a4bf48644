"""Read prompts from JSONL files, TFDS, the hub or the tiny world.

Every source gives a list of :class:`Record`; :mod:`topd_jax.data.prompts`
makes batches of them.
"""

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from topd_jax.data.settings import DataSettings, WorldSettings
from topd_jax.data.toy_world import problems

# Seed of the tiny world's held-out problems: the same in every run.
_HELD_OUT_SEED = 0


class Record(TypedDict):
    """One question.

    Keys:
      prompt: the question's text, before any chat template.
      answer: the reference answer as the source has it; "" if it has none.
      index: place in its source, from 0.
      source: where it came from, for errors: "train.jsonl line 7".
      teacher: the name of its teacher, where there are several.
    """

    prompt: str
    answer: str
    index: int
    source: str
    teacher: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Keys of a row that make a record.

    Attributes:
      prompt: key of the question.
      answer: key of the answer, kept where it exists.
      teacher: key of the name of the record's teacher; "" for none.
      teachers: the names that it may have.
    """

    prompt: str = "question"
    answer: str = "answer"
    teacher: str = ""
    teachers: Sequence[str] = ()


def read_records(
    data: DataSettings,
    world: WorldSettings,
    *,
    problems: int,
    final_problems: int,
    split: str = "validation",
    teachers: Sequence[str] = (),
) -> tuple[list[Record], list[Record], list[Record]]:
    """Read training, validation and test prompts.

    Args:
      data: where they come from.
      world: of the tiny world.
      problems: validation problems of the tiny world.
      final_problems: test problems of the tiny world.
      split: of the tiny world's validation problems.
      teachers: names of several teachers; () for the only one.

    Returns:
      (training, validation, test) prompts; without ``data.eval_path`` the
      last two are the first ``data.held_out`` records.

    Raises:
      ValueError: for what cannot be read, or too few records.
    """
    if data.source == "world":
        return (
            read_world("train", world.prompts, world.seed),
            read_world(split, problems, _HELD_OUT_SEED),
            read_world("test", final_problems, _HELD_OUT_SEED),
        )
    if not data.path:
        raise ValueError(
            f"data.path is empty; data.source={data.source!r} needs it: "
            "--config.data.path=FILE"
        )
    fields = Fields(
        data.prompt_field, data.answer_field, data.teacher_field, teachers
    )
    train = read_source(data.source, data.path, data.split, fields)
    if data.eval_path:
        held_out = read_source(
            data.source, data.eval_path, data.eval_split, fields
        )
        return train, held_out, held_out
    count = data.held_out
    if count >= len(train):
        raise ValueError(
            f"data.held_out={count} must be below the {len(train)} "
            f"prompts of {data.path}; lower it, or give data.eval_path"
        )
    return train[count:], train[:count], train[:count]


def read_source(
    source: str, path: str, split: str, fields: Fields
) -> list[Record]:
    """Read the records of one source.

    Args:
      source: "jsonl", "tfds" or "hub".
      path: of the file, or name of the dataset.
      split: of the dataset; a file has none.
      fields: keys of its rows.

    Raises:
      ValueError: where it cannot be read.
    """
    if source == "tfds":
        return read_tfds(path, fields, split=split)
    if source == "hub":
        return read_hub(path, fields, split=split)
    return read_jsonl(path, fields)


def read_jsonl(
    path: str | os.PathLike, fields: Fields = Fields()
) -> list[Record]:
    """Read a file with one JSON object a line, skipping blank lines.

    Args:
      path: the file.
      fields: keys of its objects.

    Raises:
      ValueError: if the file is missing or empty, or, with file and line, if
        a line is not a JSON object or lacks the question or its teacher.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"no file at {path}; give data.path the path of a JSONL file, "
            f'one {{"{fields.prompt}": ..., "{fields.answer}": ...}} a line'
        )
    records: list[Record] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{source} is not JSON ({error}): "
                    f"{line[:60]!r}; repair or remove the line"
                ) from error
            records.append(_record(row, len(records), source, fields))
    if not records:
        raise ValueError(f"{path} holds no records; it needs at least one")
    return records


def read_tfds(
    name: str,
    fields: Fields = Fields(),
    *,
    split: str = "train",
    data_dir: str | None = None,
) -> list[Record]:
    """Read a TensorFlow dataset (ArrayRecord; TensorFlow is not needed).

    Args:
      name: e.g. ``gsm8k`` or ``gsm8k:1.0.0``, downloaded where it is not in
        ``data_dir``; or a directory that holds a prepared dataset.
      fields: keys of its rows.
      split: of the dataset.
      data_dir: where datasets are kept; None is TFDS's default.

    Raises:
      ValueError: if there is no such dataset or split, or a record lacks the
        question.
    """
    # Imported here because it takes seconds.
    import tensorflow_datasets as tfds

    try:
        if pathlib.Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare(file_format="array_record")
        rows = builder.as_data_source(split=split)
    except (
        tfds.core.DatasetNotFoundError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        raise ValueError(
            f"cannot read TFDS dataset {name!r} split {split!r} from "
            f"{data_dir or 'the default directory'}: {_first_line(error)}; "
            "check the name, or export the questions to JSONL and set "
            "data.path"
        ) from error
    where = f"{name} {split} record"
    return [
        _record(row, i, f"{where} {i}", fields) for i, row in enumerate(rows)
    ]


def read_hub(
    name: str,
    fields: Fields = Fields(),
    *,
    split: str = "train",
) -> list[Record]:
    """Read a dataset of the Hugging Face hub; needs ``datasets``.

    Args:
      name: ``owner/dataset``, or ``owner/dataset:config``.
      fields: keys of its rows.
      split: of the dataset.

    Raises:
      ValueError: if ``datasets`` is not installed, or the dataset cannot be
        read, or a record lacks the question or its teacher.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {name!r} from the hub needs the package datasets: "
            "pip install datasets; or export the questions to JSONL and set "
            "data.path"
        ) from error
    dataset, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {name!r} split {split!r} from the hub: "
            f"{_first_line(error)}; check the name and the network, or "
            "export the questions to JSONL and set data.path"
        ) from error
    where = f"{name} {split} record"
    return [
        _record(row, i, f"{where} {i}", fields) for i, row in enumerate(rows)
    ]


def read_world(split: str, count: int, seed: int) -> list[Record]:
    """Return distinct problems of the tiny world, with their answers."""
    return [
        Record(
            prompt=problem,
            answer=problems.answer(problem),
            index=index,
            source=f"tiny world {split} problem {index}",
        )
        for index, problem in enumerate(problems.problems(split, count, seed))
    ]


def _record(
    row: Mapping[str, Any], index: int, source: str, fields: Fields
) -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{source} is JSON but not an object: it needs the field "
            f'"{fields.prompt}"'
        )
    prompt = _text(row.get(fields.prompt))
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f'{source} has no text in the field "{fields.prompt}"; its fields '
            f"are {sorted(row)}; set data.prompt_field to the one with the "
            "question"
        )
    answer = _text(row.get(fields.answer, ""))
    record = Record(
        prompt=prompt, answer=str(answer), index=index, source=source
    )
    if fields.teacher:
        record["teacher"] = _teacher(row, source, fields)
    return record


def _teacher(row: Mapping[str, Any], source: str, fields: Fields) -> str:
    name = _text(row.get(fields.teacher))
    if name in fields.teachers:
        return name
    choices = f"one of config.teachers: {', '.join(fields.teachers)}"
    if name is None:
        raise ValueError(
            f'{source} has no field "{fields.teacher}" (data.teacher_field); '
            f"its fields are {sorted(row)}; it must name {choices}"
        )
    (near,) = difflib.get_close_matches(
        str(name), fields.teachers, n=1, cutoff=0
    )
    raise ValueError(
        f'{source}: the field "{fields.teacher}" is {name!r}; it must name '
        f"{choices}; the nearest is {near!r}"
    )


def _text(value: object) -> object:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
