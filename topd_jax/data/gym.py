"""Problems of reasoning-gym: made by rule, offline, graded by their dataset.

A task is a dataset's name with options of its config:
``chain_sum(max_terms=4, size=2000, seed=1)``. Most datasets draw problem i from
``seed + i``, so tasks whose seeds are nearer than their sizes share problems.
No module here imports JAX: a worker that grades imports this one.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator
from typing import Any

from topd_jax.settings import parse_call

SOURCE = "reasoning_gym"
# They draw in an order that differs from process to process.
_UNSTEADY = (
    "isomorphic_strings", "list_functions", "polynomial_multiplication",
    "ransom_note",
)  # fmt: skip
# Where a completion's answer is looked for (evaluation/answers.py).
_ASK = "Put the final answer in \\boxed{}."


@functools.lru_cache(maxsize=4)
def open_task(task: str) -> Any:
    """Open the dataset of a task.

    Args:
      task: "NAME" or "NAME(option=value, ...)"; the seed is 0 unless given.

    Returns:
      The dataset of reasoning-gym.

    Raises:
      ValueError: without the package, for an unknown dataset or option, or a
        value that the dataset refuses.
    """
    example = "chain_sum(max_terms=4, size=2000, seed=1)"
    name, options = parse_call(task, SOURCE, example)
    if name in _UNSTEADY:
        raise ValueError(
            f"{SOURCE}={task!r}: {name} draws other problems in every process, "
            "so that none could be graded or drawn again on resume; write "
            "them to a JSONL file with their answers"
        )
    try:
        # Imported here because it takes seconds.
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError(
            f"{SOURCE}={task!r} needs the package reasoning-gym ({error}): "
            "pip install reasoning-gym"
        ) from error
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, 3, cutoff=0)
        raise ValueError(
            f"{SOURCE}={task!r}: no dataset {name!r}; the nearest of "
            f"{len(factory.DATASETS)} are {', '.join(near)}"
        )
    known = [f.name for f in dataclasses.fields(factory.DATASETS[name][1])]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{SOURCE}={task!r}: no option {unknown[0]}; the options of "
            f"{name}: {', '.join(known)}"
        )
    for option in options.keys() & {"seed", "size"}:
        if type(options[option]) is not int:
            raise ValueError(
                f"{SOURCE}={task!r}: {option}={options[option]!r} must be of "
                "type int"
            )
    try:
        dataset = factory.create_dataset(name, **{"seed": 0} | options)
        dataset[0]
    except Exception as error:  # whatever its checks raise
        raise ValueError(f"{SOURCE}={task!r}: {error}") from error
    return dataset


def problems(task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every problem of a task.

    Args:
      task: as :func:`open_task` takes it.

    Yields:
      (where it is, for errors; a row with "question", which asks for a boxed
      answer, "answer" and "metadata").

    Raises:
      ValueError: as :func:`open_task`.
    """
    for index, entry in enumerate(open_task(task)):
        question = f"{entry['question'].strip()}\n{_ASK}"
        yield f"{task} problem {index}", {**entry, "question": question}


def is_right(task: str, index: int, answer: str) -> bool:
    """Return whether a dataset's own grader gives an answer the full score.

    Args:
      task: as :func:`open_task` takes it.
      index: of the problem, from 0.
      answer: alone, without the steps to it. Partial credit counts as wrong.
    """
    dataset = open_task(task)
    return dataset.score_answer(answer, entry=dataset[index]) >= 1
