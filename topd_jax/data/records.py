"""The prompts that the settings ask for, and how answers are graded."""

import math
from collections.abc import Callable, Sequence

from absl import logging
from jax.sharding import Mesh

from topd_jax.data import sources
from topd_jax.data.routing import (
    count_records,
    places_of,
    require_even_rows,
    shares_of,
)
from topd_jax.data.sources import Record
from topd_jax.data.toy_world import problems
from topd_jax.parallel.teacher_mesh import row_ways
from topd_jax.training.config import Settings

_EVAL_SEED = 0


def teacher_shares(
    settings: Settings, parts: Sequence[list[Record]], mesh: Mesh
) -> dict[str, int]:
    """How many prompts of each teacher a batch holds.

    Args:
      settings: of the run.
      parts: of :func:`read_records`.
      mesh: of devices.

    Returns:
      name -> prompts; {} where there is one teacher.

    Raises:
      ValueError: where the rows do not divide over mesh and slices.
    """
    names, data = tuple(settings.teachers), settings.data
    if not names:
        return {}
    counts = count_records(parts[0], names)
    if absent := [n for n in names if n not in places_of(parts[-1])]:
        logging.warning(
            "no held-out prompt is of the teacher %s; data.held_out takes the "
            "first records: mix them, or give data.eval_path",
            ", ".join(absent),
        )
    if data.teacher_prompts:
        shares = dict(zip(names, data.teacher_prompts, strict=True))
    else:
        shares = shares_of(counts, data.batch_size)
    require_even_rows(
        shares,
        samples=data.samples,
        ways=row_ways(mesh),
        accumulate=settings.optimizer.accumulate,
    )
    return shares


def check_rows(
    settings: Settings, mesh: Mesh, section: str, theirs: Mesh | None = None
) -> None:
    """Refuses batches that do not divide over the mesh.

    Args:
      settings: of the run.
      mesh: of devices.
      section: whose ``batch_size`` it is, "data" or "eval".
      theirs: the teacher's own mesh, where it has one; then every part of
        ``teacher_mesh.parts`` must divide over both.

    Raises:
      ValueError: naming a size that does.
    """
    ways = row_ways(mesh)
    rows = getattr(settings, section).batch_size
    if theirs is not None:
        parts = settings.teacher_mesh.parts if section == "data" else 1
        ways = math.lcm(ways, row_ways(theirs))
        if rows % (parts * ways):
            raise ValueError(
                f"{section}.batch_size={rows} in {parts} parts must be "
                f"divisible by data x fsdp x expert of mesh and teacher_mesh "
                f"({ways}); try {-(-rows // (parts * ways)) * parts * ways}, "
                "or other sizes of their axes"
            )
        return
    if rows % ways:
        raise ValueError(
            f"{section}.batch_size={rows} must be divisible by the mesh's "
            f"data x fsdp x expert ({ways}); try {-(-rows // ways) * ways}"
        )


def read_records(settings: Settings) -> list[list[Record]]:
    """Training, validation and test prompts.

    Args:
      settings: of the run.

    Returns:
      Three lists; without ``data.eval_path`` the last two are the first
      ``data.held_out`` records.

    Raises:
      ValueError: for what cannot be read, or too few records.
    """
    data, options = settings.data, settings.eval
    if data.source == "world":
        return [
            sources.read_world(
                "train", settings.world.prompts, settings.world.seed
            ),
            sources.read_world(options.split, options.problems, _EVAL_SEED),
            sources.read_world("test", options.final_problems, _EVAL_SEED),
        ]
    fields = dict(
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        teacher_field=data.teacher_field,
        teachers=tuple(settings.teachers),
    )
    readers: dict[str, Callable[[str, str], list[Record]]] = {
        "jsonl": lambda path, split: sources.read_jsonl(path, **fields),
        "tfds": lambda path, split: sources.read_tfds(
            path, split=split, **fields
        ),
        "hub": lambda path, split: sources.read_hub(
            path, split=split, **fields
        ),
    }
    if not data.path:
        raise ValueError(
            f"data.path is empty; data.source={data.source!r} needs it: "
            "--config.data.path=FILE"
        )
    read = readers[data.source]
    train = read(data.path, data.split)
    if data.eval_path:
        held_out = read(data.eval_path, data.eval_split)
        return [train, held_out, held_out]
    if data.held_out >= len(train):
        raise ValueError(
            f"data.held_out={data.held_out} must be below the {len(train)} "
            f"prompts of {data.path}; lower it, or give data.eval_path"
        )
    return [
        train[data.held_out :],
        train[: data.held_out],
        train[: data.held_out],
    ]


def grader(settings: Settings) -> tuple[Callable, Callable]:
    """How completions are graded, and where each one's answer stands.

    Args:
      settings: of the run.

    Returns:
      ((records, completions) -> which are right, or None where answers are not
      known; completion -> the answer it gives, "" for none).
    """
    if settings.data.source == "world":

        def grade(records: Sequence[Record], texts: Sequence[str]) -> list:
            return [
                problems.is_correct(r["prompt"], t)
                for r, t in zip(records, texts, strict=True)
            ]

        return grade, lambda text: problems.final_answer(text) or ""
    from topd_jax.evaluation.grading import final_answer, grade_answers

    return grade_answers, final_answer
