"""Several frozen teachers, each with rows of its own in every batch (ours).

A field of each record names its teacher. Every batch holds a fixed number of
prompts for each of them, and its rows are ordered by teacher: shapes are
static, one program serves every step, and a teacher reads its own rows alone.
Teachers come in the order of their names everywhere; JAX keeps a dict's keys
in that order too.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import struct

from topd_jax.parallel.sharding import constrain
from topd_jax.types import Head


@struct.dataclass
class Teachers:
    """Several teachers in the place of one.

    Attributes:
      models: name -> frozen model, in the order of the names; widths, depths
        and numbers of vocabulary rows may differ.
      prompts: how many prompts of each a batch holds, in that order; static.
    """

    models: dict[str, Any]
    prompts: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def head(self) -> dict[str, Head]:
        """name -> output head [V, D], as :func:`topd_jax.update` takes it."""
        return {name: model.head for name, model in self.models.items()}

    @property
    def shares(self) -> dict[str, int]:
        """name -> prompts in a batch."""
        return dict(zip(self.models, self.prompts, strict=True))

    def row_names(self, rows: int) -> list[str]:
        """The teacher of each of a batch's rows."""
        times = rows // sum(self.prompts)
        return [n for n, p in self.shares.items() for _ in range(p * times)]

    def each(
        self, do: Callable[..., Any], rows: Any, key: jax.Array
    ) -> dict[str, Any]:
        """Lets each teacher work on its own rows.

        Args:
          do: (model, its rows, its key) -> anything.
          rows: a tree of arrays with the rows of a whole batch, ordered by
            teacher: one or more a prompt.
          key: PRNG key; every teacher gets another one.

        Returns:
          name -> what ``do`` returns.
        """
        parts = self.split(rows)
        return {
            name: do(model, parts[name], jax.random.fold_in(key, i))
            for i, (name, model) in enumerate(self.models.items())
        }

    def split(self, rows: Any) -> dict[str, Any]:
        """Each teacher's own rows of a batch; see :func:`split_rows`."""
        times = _rows(rows) // sum(self.prompts)
        return split_rows(rows, {n: p * times for n, p in self.shares.items()})


def shared_rows(student: Any, teacher: Any) -> int:
    """Vocabulary ids that the student and every teacher have a row for.

    Heads may be padded to different sizes. What only one model has a row for
    must not be drawn: the others could not read it.

    Args:
      student: the model that writes.
      teacher: a model, or :class:`Teachers`.

    Returns:
      The smallest number of rows.
    """
    several = isinstance(teacher, Teachers)
    models = teacher.models.values() if several else [teacher]
    return min(model.head.shape[0] for model in [student, *models])


def split_rows(rows: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Consecutive rows of a batch, by teacher.

    Args:
      rows: a tree of arrays [B, ...].
      sizes: name -> number of rows, in order; they add up to B.

    Returns:
      name -> the same tree with the rows of that teacher, spread over the
      whole mesh again where they divide over it.

    Raises:
      ValueError: where the sizes do not add up.
    """
    if sum(sizes.values()) != _rows(rows):
        spelt = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"the rows of the teachers ({spelt}) must add up to the batch's "
            f"{_rows(rows)}"
        )
    out, begin = {}, 0
    for name, size in sizes.items():

        def part(x: jax.Array, begin: int = begin, size: int = size) -> Any:
            # Cut out of the batch, they lie on some of the devices only.
            own = x[begin : begin + size]
            return constrain(own, "batch", *[None] * (x.ndim - 1))

        out[name] = jax.tree.map(part, rows)
        begin += size
    return out


def by_name(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several teachers in one mapping.

    Args:
      parts: teacher -> metric -> anything.

    Returns:
      "metric/teacher" -> the same.
    """
    return {
        f"{metric}/{name}": value
        for name, part in parts.items()
        for metric, value in part.items()
    }


def total(parts: Iterable[Mapping[str, tuple]]) -> dict[str, tuple]:
    """Adds up the metrics of several teachers.

    Args:
      parts: name -> (sum, count), one mapping a teacher.

    Returns:
      name -> (sum, count) over all that have it.
    """
    out: dict[str, tuple] = {}
    for part in parts:
        for name, value in part.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + value[0], before[1] + value[1])
    return out


def _rows(tree: Any) -> int:
    (rows,) = {x.shape[0] for x in jax.tree.leaves(tree)}
    return rows


def check_teachers(data: Any, names: Sequence[str]) -> None:
    """Refuses settings of several teachers that do not fit each other.

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
    fixed = data.teacher_prompts
    if fixed and (
        len(fixed) != len(names)
        or min(fixed) < 1
        or sum(fixed) != data.batch_size
    ):
        raise ValueError(
            f"data.teacher_prompts={fixed} must be {len(names)} numbers "
            f"above 0 (for {', '.join(names) or 'no teachers'}) whose sum "
            f"is data.batch_size={data.batch_size}"
        )
