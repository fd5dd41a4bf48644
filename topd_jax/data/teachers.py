"""Teachers, each with rows of its own in every batch.

The paper has one teacher; several are an addition of this project.

A field of each record names its teacher. Every batch holds a fixed number of
prompts for each of them, and its rows are ordered by teacher: shapes are
static, one program serves every step, and a teacher reads its own rows alone.
Teachers come in the order of their names everywhere; JAX keeps a dict's keys
in that order too.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.data.settings import DataSettings
from topd_jax.parallel.sharding import constrain
from topd_jax.types import Teacher


def shared_vocab(student: Any, teachers: Sequence[Teacher]) -> int:
    """Return the vocabulary ids that the student and every teacher have.

    Heads may be padded to different sizes. What only one model has a row for
    must not be drawn: the others could not read it.

    Args:
      student: the model that writes.
      teachers: that read.
    """
    models = [student, *(t.beside(student) for t in teachers)]
    return min(model.head.shape[0] for model in models)


def split_rows(rows: Any, teachers: Sequence[Teacher]) -> list[Any]:
    """Split a batch into the rows of each teacher.

    Args:
      rows: a tree of arrays [B, ...], consecutive by teacher.
      teachers: in the order of the rows.

    Returns:
      The same tree for every teacher, spread over the whole mesh again where
      its rows divide over it.

    Raises:
      ValueError: where the prompts of the teachers do not divide the rows.
    """
    if len(teachers) == 1:
        return [rows]
    (count,) = {x.shape[0] for x in jax.tree.leaves(rows)}
    prompts = sum(t.prompts for t in teachers)
    if count % prompts:
        spelled = ", ".join(f"{t.name}: {t.prompts}" for t in teachers)
        raise ValueError(
            f"the batch has {count} rows, which its {prompts} prompts "
            f"({spelled}) must divide"
        )
    out, begin = [], 0
    for teacher in teachers:
        end = begin + teacher.prompts * (count // prompts)
        # Sliced from the batch, they lie on some of the devices only.
        part = functools.partial(_slice, begin=begin, end=end)
        out.append(jax.tree.map(part, rows))
        begin = end
    return out


def _slice(x: jax.Array, begin: int, end: int) -> jax.Array:
    return constrain(x[begin:end], "batch", *[None] * (x.ndim - 1))


def by_name(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put the metrics of several teachers into one mapping.

    Args:
      parts: teacher -> metric -> anything.

    Returns:
      "metric/teacher" -> the same; nothing for the only teacher, "".
    """
    return {
        f"{metric}/{name}": value
        for name, part in parts.items()
        if name
        for metric, value in part.items()
    }


def total_metrics(parts: Sequence[Mapping[str, tuple]]) -> dict[str, tuple]:
    """Add up the metrics of several teachers.

    Args:
      parts: name -> (sum, count), one mapping a teacher.

    Returns:
      name -> (sum, count) over all that have it; the smallest of
      "length_min" and the largest of "length_max".
    """
    if len(parts) == 1:
        return dict(parts[0])
    out: dict[str, tuple] = {}
    for part in parts:
        for name, value in part.items():
            before = out.get(name)
            if before is None:
                out[name] = value
            elif name in ("length_min", "length_max"):
                choose = jnp.minimum if name.endswith("min") else jnp.maximum
                out[name] = (choose(before[0], value[0]), value[1])
            elif name == "num_tokens":
                out[name] = (before[0] + value[0], value[1])
            else:
                out[name] = (before[0] + value[0], before[1] + value[1])
    return out


def check_teachers(data: DataSettings, names: Sequence[str]) -> None:
    """Refuse settings of several teachers that do not fit each other.

    Args:
      data: ``config.data``.
      names: of ``config.teachers``; none for the one ``config.teacher``.

    Raises:
      ValueError: by name.
    """
    for name in names:
        # It becomes part of a metric's name and of a setting's.
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"config.teachers: the name {name!r} must be of letters, "
                "digits, _ and -"
            )
    if bool(names) != bool(data.teacher_field):
        raise ValueError(
            f"config.teachers names {len(names)} teachers and "
            f"data.teacher_field={data.teacher_field!r}; give both, or "
            "neither for the one config.teacher"
        )
    if names and data.source == "world":
        raise ValueError(
            "data.source='world' has no field that names a teacher; with "
            "config.teachers it must be one of jsonl, tfds, hub"
        )
    if data.batch_size < len(names):
        raise ValueError(
            f"data.batch_size={data.batch_size} must be at least "
            f"{len(names)}, one prompt for each of config.teachers"
        )
    fixed = data.prompts_per_teacher
    if fixed and (len(fixed), sum(fixed)) != (len(names), data.batch_size):
        raise ValueError(
            f"data.prompts_per_teacher={fixed} must be {len(names)} numbers "
            f"(for {', '.join(names) or 'no teachers'}) whose sum "
            f"is data.batch_size={data.batch_size}"
        )
