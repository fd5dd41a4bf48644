"""Several written solutions in one row: less padding, the same loss.

Stage 1 of arXiv:2606.00305 (App. B) packs to 16384 tokens; how is ours. A
batch is a fixed number of *solutions*, whatever its layout: packing decides
only how many rows they take, and so the packed and the unpacked run take the
same steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from flax import struct

from topd_jax.data import solutions as solution_data
from topd_jax.data.solutions import Solution
from topd_jax.models.attention.masks import Spans, packed_spans
from topd_jax.sampling.prompts import bucket

# (prompt ids, completion ids, whether the completion does not end)
Pair = tuple[np.ndarray, np.ndarray, bool]


@struct.dataclass
class PackedRows:
    """Written prompts with their completions, several to a row.

    One pair after the other; each is a segment that attends to itself alone
    and whose positions begin at 0, so that a row is read as its segments are
    read apart. What is said of a token is said in completion coordinates with
    P = 1: the column of a row that nothing predicts is its first.

    Attributes:
      sequence: i32[B, L] token ids, padded on the right.
      segments: i32[B, L] which pair of its row a column is of, from 1; 0 is
        padding.
      positions: i32[B, L] rotary positions, 0 at the first of each segment.
      targets: bool[B, L] tokens to be learnt: completions, up to and
        including the first end-of-sequence token.
      truncated: i32[B] pairs of each row that do not end.
    """

    sequence: jax.Array
    segments: jax.Array
    positions: jax.Array
    targets: jax.Array
    truncated: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """i32[B, L - 1]: the tokens that some column predicts."""
        return self.sequence[:, 1:]

    @property
    def mask(self) -> jax.Array:
        """bool[B, L - 1]: which of :attr:`tokens` are to be learnt."""
        return self.targets[:, 1:]

    @property
    def spans(self) -> Spans:
        """Columns of the same segment that are not later.

        Padding sees padding, and nothing else sees it.
        """
        return packed_spans(self.segments)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest rows (Johnson, 1973).

    Args:
      lengths: tokens of each solution, at most ``capacity``.
      capacity: tokens of a row.

    Returns:
      The solutions of each row, by index; a function of the arguments alone.

    Raises:
      ValueError: for a solution that no row holds.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(
            f"a solution of {longest} tokens does not fit a row of "
            f"{capacity}; raise the row's length"
        )
    rows: list[list[int]] = []
    room: list[int] = []
    # Stable: solutions of one length keep their order.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r, left in enumerate(room) if lengths[index] <= left)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def row_count(needed: int, unit: int) -> int:
    """Rows of a batch that needs some, so that few counts occur.

    Every count is one compilation: multiples of ``unit`` up to 16, then of 2,
    4, 8 ... units, never an eighth more than is needed in whole units.

    Args:
      needed: rows that hold something.
      unit: what a number of rows must be divisible by.

    Returns:
      At least ``needed``.
    """
    units = -(-needed // unit)
    step = 1
    while units > 16 * step:
        step *= 2
    return -(-units // step) * step * unit


def pack(
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]],
    *,
    shape: tuple[int, int],
    pad_id: int,
) -> PackedRows:
    """Lays solutions out in rows.

    Args:
      pairs: the solutions.
      rows: which of them stand in each row, as :func:`first_fit` gives it.
      shape: (B, L); rows beyond ``len(rows)`` are padding.
      pad_id: the id that fills rows.

    Returns:
      Rows of NumPy arrays.
    """
    sequence = np.full(shape, pad_id, np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    targets = np.zeros(shape, bool)
    truncated = np.zeros(shape[0], np.int32)
    for row, members in enumerate(rows):
        end = 0
        for number, member in enumerate(members, start=1):
            prompt, completion, cut = pairs[member]
            begin, end = end, end + len(prompt) + len(completion)
            sequence[row, begin:end] = np.concatenate([prompt, completion])
            segments[row, begin:end] = number
            positions[row, begin:end] = np.arange(end - begin)
            targets[row, begin + len(prompt) : end] = True
            truncated[row] += cut
    return PackedRows(sequence, segments, positions, targets, truncated)


class SolutionStream:
    """Batches of written solutions for ever, shuffled anew each epoch.

    The order is a function of the seed alone, the state is one number and the
    solutions' fingerprint, and every process takes its own rows of the same
    global batch: neither a resume nor another number of processes changes
    what a step sees.
    """

    def __init__(
        self,
        solutions: Sequence[Solution],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        batch_size: int,
        length: int,
        unit: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Cuts what is too long, and begins at the first batch.

        Args:
          solutions: what was kept of a set.
          eos_ids: the ids that end a completion.
          pad_id: the id that fills rows.
          batch_size: solutions of the global batch.
          length: columns of a packed row; what is longer is cut off there. 0
            gives every solution a row, as wide as the batch's longest asks.
          unit: what the number of rows must be divisible by.
          seed: of the order; nothing else enters it.
          process_index: which of the processes this is.
          process_count: how many share each batch; ``unit`` is divisible by
            it.

        Raises:
          ValueError: for fewer solutions than a batch, a solution whose
            prompt alone fills a row, rows that do not divide by ``unit``.
        """
        if batch_size > len(solutions):
            raise ValueError(
                f"data.batch_size x data.samples = {batch_size} solutions a "
                f"step must not exceed the {len(solutions)} there are; lower "
                "it, or generate more"
            )
        if not length and batch_size % unit:
            raise ValueError(
                f"data.batch_size x data.samples = {batch_size} rows must be "
                f"divisible by {unit} (devices x optimizer.accumulate); try "
                f"{-(-batch_size // unit) * unit}, or offline.pack_length"
            )
        self._pairs = [_pair(s, eos_ids, length) for s in solutions]
        cut = sum(
            len(completion) < len(s["completion_tokens"])
            for (_, completion, _), s in zip(
                self._pairs, solutions, strict=True
            )
        )
        if cut:
            logging.warning(
                "%d of %d solutions are cut off at offline.pack_length=%d",
                cut, len(solutions), length,
            )  # fmt: skip
        self._fingerprint = solution_data.fingerprint(solutions)
        self._length, self._unit, self._pad_id = length, unit, pad_id
        self._process = process_index, process_count
        self._batches = iter(
            grain.MapDataset.range(len(solutions))
            .shuffle(seed=seed)
            .repeat()
            .batch(batch_size, drop_remainder=True)
            .map(self._rows)
            .to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            )
        )

    def __iter__(self) -> Iterator[PackedRows]:
        return self

    def __next__(self) -> PackedRows:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {
            "solutions": self._fingerprint,
            "batches": self._batches.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position.

        Raises:
          ValueError: where it is a position in other solutions.
        """
        if state.get("solutions") != self._fingerprint:
            raise ValueError(
                "the checkpoint was made with other solutions (fingerprint "
                f"{state.get('solutions')} there, {self._fingerprint} here); "
                "use another --workdir, or the offline.path it was started "
                "with"
            )
        self._batches.set_state(state["batches"])

    def _rows(self, index: np.ndarray) -> PackedRows:
        pairs = [self._pairs[i] for i in index]
        lengths = [len(p) + len(c) for p, c, _ in pairs]
        # The shape is the global batch's: all processes run one program.
        if self._length:
            rows = first_fit(lengths, self._length)
            shape = row_count(len(rows), self._unit), self._length
        else:
            rows = [[i] for i in range(len(pairs))]
            shape = len(rows), bucket(max(lengths))
        own, count = self._process
        share = shape[0] // count
        return pack(
            pairs,
            rows[own * share : (own + 1) * share],
            shape=(share, shape[1]),
            pad_id=self._pad_id,
        )


def _pair(solution: Solution, eos_ids: Sequence[int], length: int) -> Pair:
    """The tokens of a solution: the first end counts, and fits the row."""
    prompt, completion = (
        solution["prompt_tokens"],
        solution["completion_tokens"],
    )
    ends = np.flatnonzero(np.isin(completion, eos_ids))
    if len(ends):
        completion = completion[: ends[0] + 1]
    if length and len(prompt) + len(completion) > length:
        if len(prompt) >= length:
            raise ValueError(
                f"the prompt of solution {solution['index']} has "
                f"{len(prompt)} tokens; a row of offline.pack_length={length} "
                "has no room for its completion: raise it"
            )
        completion = completion[: length - len(prompt)]
    return prompt, completion, not np.isin(completion[-1], eos_ids)
