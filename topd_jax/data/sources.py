"""Read prompts from JSONL files, TFDS, the hub, reasoning-gym or a tiny world.

Every source gives a list of :class:`Record`; :mod:`topd_jax.data.prompts`
makes batches of them.
"""

import dataclasses
import difflib
import numbers
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from absl import logging

from topd_jax.data import gym
from topd_jax.data.settings import DataSettings, WorldSettings
from topd_jax.data.templates import as_text, is_missing, teacher_prompt
from topd_jax.data.toy_world import problems
from topd_jax.parallel import buckets
from topd_jax.settings import parse_json

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
      teacher_prompt: what its teacher reads instead of the question, before
        any chat template; missing where it is the question.
      task: of reasoning-gym, whose grader counts instead of the answer;
        ``index`` is the problem's place in it.
    """

    prompt: str
    answer: str
    index: int
    source: str
    teacher: NotRequired[str]
    teacher_prompt: NotRequired[str]
    task: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Keys of a row that make a record.

    Attributes:
      prompts: keys of the question; the first that a row has counts.
      answer: key of the answer, kept where it exists.
      teacher: key of the name of the record's teacher; "" for none.
      teachers: the names that it may have.
      templates: name of a teacher, "" for the only one -> template of what it
        reads, "" for the question; None: no record has a prompt for it.
    """

    prompts: Sequence[str] = ("question",)
    answer: str = "answer"
    teacher: str = ""
    teachers: Sequence[str] = ()
    templates: Mapping[str, str] | None = None


def read_records(
    data: DataSettings,
    world: WorldSettings,
    *,
    problems: int,
    final_problems: int,
    templates: Mapping[str, str] = types.MappingProxyType({"": ""}),
) -> tuple[list[Record], list[Record], list[Record]]:
    """Read training, validation and test prompts.

    Args:
      data: where they come from.
      world: of the tiny world.
      problems: validation problems of the tiny world.
      final_problems: test problems of the tiny world.
      templates: name of each teacher, "" for the only one -> template of
        what it reads; "" for the question.

    Returns:
      (training, validation, test) prompts; without ``data.eval_path`` the
      last two are the first ``data.held_out`` records. No training prompt is
      also held out.

    Raises:
      ValueError: for what cannot be read, or too few records.
    """
    if data.source == "world":
        if path := data.path or data.eval_path:
            raise ValueError(
                f"data.source='world' does not read {path}; say what does, for "
                "instance --config.data.source=jsonl, or leave the path out"
            )
        template = templates.get("", "")
        return (
            read_world("train", world.prompts, world.seed, template),
            read_world("validation", problems, _HELD_OUT_SEED, template),
            read_world("test", final_problems, _HELD_OUT_SEED, template),
        )
    if not data.path:
        raise ValueError(
            f"data.path is empty; data.source={data.source!r} needs it: "
            "--config.data.path=FILE"
        )
    fields = Fields(
        (data.prompt_field,), data.answer_field, data.teacher_field,
        tuple(templates), templates,
    )  # fmt: skip
    train = read_source(data.source, data.path, data.split, fields)
    if data.eval_path:
        held_out = read_source(
            data.source, data.eval_path, data.eval_split, fields
        )
    elif data.held_out < len(train):
        count = data.held_out
        held_out, train = train[:count], train[count:]
    else:
        raise ValueError(
            f"data.held_out={data.held_out} must be below the {len(train)} "
            f"prompts of {data.path}; lower it, or give data.eval_path"
        )
    train = without(held_out, train)
    if not train:
        where = f"data.eval_path={data.eval_path!r}"
        if not data.eval_path:
            where = f"the first data.held_out={data.held_out}"
        raise ValueError(
            f"every prompt of data.path={data.path!r} is held out by {where}; "
            "give others by data.eval_path, of reasoning-gym another seed="
        )
    return train, held_out, held_out


def without(held_out: Sequence[Record], records: Sequence[Any]) -> list[Any]:
    """Return what is not of a prompt that is held out, and log the rest.

    Args:
      held_out: prompts of evaluations.
      records: to train on, or solutions of such.
    """
    asked = {record["prompt"] for record in held_out}
    kept = [r for r in records if r["prompt"] not in asked]
    if len(kept) < len(records):
        logging.warning(
            "%d of %d records have a prompt that is held out: left out",
            len(records) - len(kept), len(records),
        )  # fmt: skip
    return kept


def read_source(
    source: str, path: str, split: str = "train", fields: Fields = Fields()
) -> list[Record]:
    """Read the records of one source.

    Args:
      source: "jsonl", one JSON object a line, blank lines skipped; "tfds",
        ArrayRecord (TensorFlow is not needed); "hub", Hugging Face's, which
        needs ``datasets``; or "reasoning_gym", each question once.
      path: of the file; or e.g. ``gsm8k:1.0.0`` of TFDS, downloaded where it
        is missing, or the directory of a prepared dataset; or of the hub
        ``owner/dataset`` or ``owner/dataset:config``; or a task, see
        :func:`topd_jax.data.gym.open_task`.
      split: of the dataset; a file has none.
      fields: keys of its rows.

    Raises:
      ValueError: where it cannot be read or is empty, or, with its place, for
        a row that is no object or lacks the question or its teacher.
    """
    if source == "jsonl":
        rows = _read_lines(buckets.as_path(path), fields)
    elif source == gym.SOURCE:
        rows = gym.problems(path)
    else:
        dataset = _open_dataset(source, path, split)
        where = f"{path} {split} record"
        rows = ((f"{where} {i}", row) for i, row in enumerate(dataset))
    records = [
        _record(row, i, where, fields) for i, (where, row) in enumerate(rows)
    ]
    if source == gym.SOURCE:
        first = {r["prompt"]: r | {"task": path} for r in reversed(records)}
        records = list(reversed(first.values()))
    if not records:
        raise ValueError(f"{path} holds no records; it needs at least one")
    return records


def _read_lines(
    path: pathlib.Path, fields: Fields
) -> Iterator[tuple[str, Any]]:
    """Yield (place, object) of each line."""
    if not path.is_file():
        raise ValueError(
            f"no file at {path}; give data.path the path of a JSONL file, "
            f'one {{"{fields.prompts[0]}": ..., "{fields.answer}": ...}} a line'
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            yield where, parse_json(line, where)


def _open_dataset(source: str, name: str, split: str) -> Iterable[Any]:
    try:
        # Imported here because it takes seconds.
        if source == "hub":
            import datasets

            dataset, _, config = name.partition(":")
            return datasets.load_dataset(dataset, config or None, split=split)
        import tensorflow_datasets as tfds

        if pathlib.Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name)
            builder.download_and_prepare(file_format="array_record")
        return builder.as_data_source(split=split)
    # RuntimeError: of a hub's dataset that is a script, or a file format.
    except (
        ImportError, OSError, ValueError, KeyError, RuntimeError,
        AssertionError,
    ) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "check the name and the network"
        if isinstance(error, ImportError):
            way_out = f"pip install {error.name}"
        elif isinstance(error, NotImplementedError):
            way_out = 'prepare it anew with file_format="array_record"'
        raise ValueError(
            f"cannot read {source} dataset {name!r} split {split!r}: {reason}; "
            f"{way_out}, or export the questions to JSONL and set data.path"
        ) from error


def read_world(
    split: str, count: int, seed: int, template: str = ""
) -> list[Record]:
    """Return distinct problems of the tiny world, with their answers.

    Args:
      split: "train", "validation" or "test".
      count: how many.
      seed: of the sample.
      template: of what the teacher reads, over "question", "answer",
        "solution" (the teacher's, correct) and "hint" (its first step).

    Raises:
      ValueError: for a field that the world does not have.
    """
    records = []
    for index, problem in enumerate(problems.problems(split, count, seed)):
        row = {"question": problem, "answer": problems.answer(problem)}
        if template:
            row |= problems.privileged(problem)
        fields = Fields(templates={"": template})
        source = f"tiny world {split} problem {index}"
        records.append(_record(row, index, source, fields))
    return records


def _record(
    row: Mapping[str, Any], index: int, source: str, fields: Fields
) -> Record:
    names = '" or "'.join(fields.prompts)
    if not isinstance(row, Mapping):
        raise ValueError(
            f'{source} is JSON but not an object: it needs the field "{names}"'
        )
    prompt = next((row[k] for k in fields.prompts if k in row), None)
    prompt = as_text(prompt, source)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'{source} has no text in the field "{names}"; its fields '
            f"are {sorted(row)}; set data.prompt_field to the one with the "
            "question"
        )
    answer = as_text(row.get(fields.answer), source)
    if is_missing(answer):
        answer = ""
    if not isinstance(answer, str | numbers.Real):
        raise ValueError(
            f'{source} has the answer {answer!r} in the field "'
            f'{fields.answer}"; it must be text or a number: repair it, or set '
            "data.answer_field to another field, or to one that is not there"
        )
    record = Record(
        prompt=prompt, answer=str(answer), index=index, source=source
    )
    teacher = _teacher(row, source, fields) if fields.teacher else ""
    if teacher:
        record["teacher"] = teacher
    if fields.templates is not None:
        template = fields.templates[teacher]
        own = teacher_prompt(row, teacher, template, source)
        if own is not None:
            record["teacher_prompt"] = own
    return record


def _teacher(row: Mapping[str, Any], source: str, fields: Fields) -> str:
    name = as_text(row.get(fields.teacher), source)
    if name in fields.teachers:
        return name
    near = difflib.get_close_matches(str(name), fields.teachers, 1, cutoff=0)
    raise ValueError(
        f'{source}: the field "{fields.teacher}" (data.teacher_field) is '
        f"{name!r}; it must name one of config.teachers: "
        f"{', '.join(fields.teachers)}; the nearest is {near[0]!r}; the "
        f"record's fields are {sorted(row)}"
    )
