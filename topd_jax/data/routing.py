"""Which teacher each prompt belongs to, and how many a batch holds.

A field of each record names its teacher (``data.teacher_field``). The paper
has one teacher.
"""

import fractions
from collections.abc import Mapping, Sequence

from absl import logging
from jax.sharding import Mesh

from topd_jax.data.settings import DataSettings
from topd_jax.data.sources import Record
from topd_jax.parallel.sharding import row_ways


def places_of(records: Sequence[Record]) -> dict[str, list[int]]:
    """Return the places of each teacher's records.

    Args:
      records: any; those that name no teacher are listed under "".

    Returns:
      name -> indices, ascending; in the order of the names.
    """
    places: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        places.setdefault(record.get("teacher", ""), []).append(i)
    return dict(sorted(places.items()))


def prompts_per_teacher(
    data: DataSettings,
    names: Sequence[str],
    train: Sequence[Record],
    held_out: Sequence[Record],
    *,
    mesh: Mesh,
    accumulate: int,
) -> dict[str, int]:
    """Return how many prompts of a batch belong to each teacher.

    Args:
      data: whose ``prompts_per_teacher`` gives the numbers; without it they
        follow the teachers' shares of the records.
      names: of several teachers, in order; none for the only one.
      train: training prompts.
      held_out: prompts of evaluations.
      mesh: of devices.
      accumulate: slices of a batch, one update's gradients.

    Returns:
      name -> prompts; {} where there is one teacher.

    Raises:
      ValueError: for a teacher without a training prompt, or rows that do not
        divide over mesh and slices.
    """
    if not names:
        return {}
    places = places_of(train)
    for name in names:
        if name not in places:
            raise ValueError(
                f"no training record names the teacher {name!r}; add some, or "
                f"take config.teachers.{name} out"
            )
    evaluated = places_of(held_out)
    if absent := [name for name in names if name not in evaluated]:
        logging.warning(
            "no held-out prompt is of the teacher %s; data.held_out takes the "
            "first records: mix them, or give data.eval_path",
            ", ".join(absent),
        )
    if data.prompts_per_teacher:
        prompts = dict(zip(names, data.prompts_per_teacher, strict=True))
    else:
        counts = {name: len(places[name]) for name in names}
        prompts = shares_of(counts, data.batch_size)
    check_teacher_rows(
        prompts,
        samples=data.samples,
        ways=row_ways(mesh),
        accumulate=accumulate,
    )
    return prompts


def shares_of(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """Divide a batch's prompts among teachers by their shares of the records.

    By largest remainder (Hamilton's method), but at least one each.

    Args:
      counts: name -> records.
      size: prompts of a batch, at least as many as there are names.

    Returns:
      name -> prompts, in the order of ``counts``; their sum is ``size``.
    """
    total = sum(counts.values())
    quota = {n: fractions.Fraction(size * c, total) for n, c in counts.items()}
    prompts = {n: max(int(q), 1) for n, q in quota.items()}
    while sum(prompts.values()) < size:
        prompts[max(prompts, key=lambda n: quota[n] - prompts[n])] += 1
    while sum(prompts.values()) > size:
        several = [n for n in prompts if prompts[n] > 1]
        prompts[max(several, key=lambda n: prompts[n] - quota[n])] -= 1
    return prompts


def check_rows(rows: int, mesh: Mesh, setting: str) -> None:
    """Refuse a batch whose rows do not divide over the mesh.

    Args:
      rows: of the batch.
      mesh: of devices.
      setting: its name, for the error.

    Raises:
      ValueError: with a size that does.
    """
    ways = row_ways(mesh)
    if rows % ways:
        raise ValueError(
            f"{setting}={rows} must be divisible by the mesh's "
            f"data x fsdp x expert ({ways}); try {-(-rows // ways) * ways}"
        )


def check_teacher_rows(
    prompts: Mapping[str, int], *, samples: int, ways: int, accumulate: int
) -> None:
    """Refuse rows of a teacher that do not divide over devices and slices.

    Args:
      prompts: name -> prompts in a batch.
      samples: rows a prompt.
      ways: devices that rows are spread over.
      accumulate: slices of a batch, one update's gradients.

    Raises:
      ValueError: with the numbers, and ones that fit where there are any.
    """
    unit = ways * accumulate
    for name, count in prompts.items():
        if count * samples % unit == 0:
            continue
        # The smallest number of prompts that fits divides all that do.
        step = next(p for p in range(1, unit + 1) if p * samples % unit == 0)
        size = sum(prompts.values())
        units = max(-(-size // step), len(prompts))
        fits = tuple(step * u for u in shares_of(prompts, units).values())
        raise ValueError(
            f"teacher {name!r} has {count} of the {size} prompts of a batch "
            f"x data.samples={samples}: {count * samples} rows, which must "
            f"be divisible by the mesh's data x fsdp x expert ({ways}) x "
            f"optimizer.accumulate ({accumulate}); try data.batch_size="
            f"{sum(fits)} with data.prompts_per_teacher={fits}"
        )
