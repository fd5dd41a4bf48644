"""Which teacher each prompt belongs to, and how many a batch holds (ours).

A field of each record names its teacher (``data.teacher_field``).
"""

import fractions
from collections.abc import Mapping, Sequence

from topd_jax.data.sources import Record


def places_of(records: Sequence[Record]) -> dict[str, list[int]]:
    """Where each teacher's records are.

    Args:
      records: any; those that name no teacher are kept under "".

    Returns:
      name -> indices, ascending; in the order of the names.
    """
    found: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        found.setdefault(record.get("teacher", ""), []).append(i)
    return dict(sorted(found.items()))


def count_records(
    records: Sequence[Record], names: Sequence[str]
) -> dict[str, int]:
    """How many training records each teacher has.

    Args:
      records: of the training data.
      names: of the teachers, in order.

    Returns:
      name -> number.

    Raises:
      ValueError: for a teacher without a record.
    """
    places = places_of(records)
    for name in names:
        if name not in places:
            raise ValueError(
                f"no training record names the teacher {name!r}; add some, or "
                f"take config.teachers.{name} out"
            )
    return {name: len(places[name]) for name in names}


def shares_of(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """How many of a batch's prompts belong to each teacher.

    By largest remainder of their share of the records (Hamilton's method),
    but at least one.

    Args:
      counts: name -> records.
      size: prompts of a batch, at least as many as there are names.

    Returns:
      name -> prompts, in the order of ``counts``; their sum is ``size``.
    """
    total = sum(counts.values())
    quota = {n: fractions.Fraction(size * c, total) for n, c in counts.items()}
    given = {n: max(int(q), 1) for n, q in quota.items()}
    while sum(given.values()) < size:
        given[max(given, key=lambda n: quota[n] - given[n])] += 1
    while sum(given.values()) > size:
        large = [n for n in given if given[n] > 1]
        given[max(large, key=lambda n: given[n] - quota[n])] -= 1
    return given


def require_even_rows(
    shares: Mapping[str, int], *, samples: int, ways: int, accumulate: int
) -> None:
    """Refuses rows of a teacher that devices and slices cannot share equally.

    Args:
      shares: name -> prompts in a batch.
      samples: rows a prompt.
      ways: devices that rows are spread over.
      accumulate: slices that a batch is worked through in.

    Raises:
      ValueError: with the numbers, and ones that fit where there are any.
    """
    unit = ways * accumulate
    for name, prompts in shares.items():
        if prompts * samples % unit == 0:
            continue
        # The smallest number of prompts that fits is a step of all that do.
        step = next(p for p in range(1, unit + 1) if p * samples % unit == 0)
        size = sum(shares.values())
        units = max(-(-size // step), len(shares))
        fits = tuple(step * u for u in shares_of(shares, units).values())
        raise ValueError(
            f"teacher {name!r} has {prompts} of the {size} prompts of a batch "
            f"x data.samples={samples}: {prompts * samples} rows, which must "
            f"be divisible by the mesh's data x fsdp x expert ({ways}) x "
            f"optimizer.accumulate ({accumulate}); try data.batch_size="
            f"{sum(fits)} with data.teacher_prompts={fits}"
        )
