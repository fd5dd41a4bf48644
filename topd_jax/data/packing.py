"""Rows for supervised training: one written solution each, or several.

Stage 1 of arXiv:2606.00305 (App. B) packs rows of 16384 tokens; it does not
say how. A batch is a fixed number of *solutions*: packing decides only how
many rows they take, so a packed and an unpacked run take the same steps.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct

from topd_jax.data.prompts import Stream, fingerprint, shuffled
from topd_jax.data.solutions import Solution
from topd_jax.models.attention.masks import IntervalMask, packed_intervals
from topd_jax.types import Trajectories

# (prompt ids, completion ids, whether the completion does not end)
Pair = tuple[np.ndarray, np.ndarray, bool]


@struct.dataclass
class PackedRows:
    """Prompts with their completions, one or more to a row.

    Each pair is a segment that attends to itself alone and whose positions
    begin at 0, so every segment is read as if it were alone. Completion
    coordinates have P = 1 here: only the first column of a row is predicted
    by nothing.

    Attributes:
      sequence: i32[B, L] token ids and padding.
      segments: i32[B, L] number of the pair of each column, from 1 in every
        row; 0 is padding.
      positions: i32[B, L] rotary positions, 0 at the first of each segment.
      targets: bool[B, L] the targets of the loss: completions, up to and
        including the first end-of-sequence token.
      truncated: i32[B] pairs of each row without an end.
    """

    sequence: jax.Array
    segments: jax.Array
    positions: jax.Array
    targets: jax.Array
    truncated: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """i32[B, L - 1]: the tokens that a column predicts."""
        return self.sequence[:, 1:]

    @property
    def mask(self) -> jax.Array:
        """bool[B, L - 1]: which of :attr:`tokens` are targets."""
        return self.targets[:, 1:]

    @property
    def attention_mask(self) -> IntervalMask:
        """Columns of the same segment that are not later.

        Padding sees padding, and nothing else sees it.
        """
        return packed_intervals(self.segments)


def rows_of(trajectories: Trajectories) -> PackedRows:
    """Turn a rollout into rows of one segment each.

    The columns stay where they are, padding on the left included.

    Args:
      trajectories: B rows of P + T columns.

    Returns:
      PackedRows with L = P + T.
    """
    mask = trajectories.mask
    prompt = jnp.zeros_like(trajectories.prompt_mask)
    return PackedRows(
        sequence=trajectories.sequence,
        segments=trajectories.sequence_mask.astype(jnp.int32),
        positions=trajectories.positions,
        targets=jnp.concatenate([prompt, mask], axis=-1),
        truncated=trajectories.truncated.astype(jnp.int32),
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign solutions to rows by first-fit decreasing.

    Takes at most 11/9 of the fewest rows, asymptotically (Johnson, 1973).

    Args:
      lengths: tokens of each solution, at most ``capacity``.
      capacity: tokens of a row.

    Returns:
      The solutions of each row, by index; the same for the same arguments.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    # The sort is stable: solutions of equal length keep their order.
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
    """Round up the number of rows of a batch, so that few numbers occur.

    Every number is one compilation: multiples of ``unit`` up to 16 units,
    then of 2, 4, 8 ... units, at most an eighth more than the whole units
    needed.

    Args:
      needed: rows that hold something.
      unit: that the number must be divisible by.

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
    """Lay solutions out in rows, padded on the right.

    Args:
      pairs: the solutions.
      rows: the solutions of each row, by index, as :func:`first_fit` returns.
      shape: (B, L); rows beyond ``len(rows)`` are padding.
      pad_id: the id of the padding.

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


class SolutionStream(Stream):
    """Iterate over batches of written solutions, each epoch shuffled anew.

    The stream never ends. Its order is a function of the seed alone, its state
    is one number and the solutions' fingerprint, and every process makes the
    same batches: neither a resume nor another number of processes changes what
    a step sees.

    Attributes:
      longest: tokens of the longest solution with its prompt.
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
    ) -> None:
        """Truncate solutions that are too long; start at the first batch.

        Args:
          solutions: those that were kept of a set.
          eos_ids: the ids that end a completion.
          pad_id: the id of the padding.
          batch_size: solutions of a batch.
          length: columns of a packed row; longer solutions are truncated. 0
            gives every solution a row, as wide as the longest of all, rounded
            up to a multiple of 8.
          unit: that the number of rows must be divisible by.
          seed: of the order; nothing else changes it.

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
                "%d of %d solutions are truncated to offline.pack_length=%d",
                cut, len(solutions), length,
            )  # fmt: skip
        mark = fingerprint(
            s[name]
            for s in solutions
            for name in ("prompt_tokens", "completion_tokens")
        )
        self._packed, self._unit, self._pad_id = length > 0, unit, pad_id
        self.longest = max(len(p) + len(c) for p, c, _ in self._pairs)
        # The same for every batch: one program serves all.
        self._width = length or -(-self.longest // 8) * 8
        batches = shuffled(range(len(solutions)), seed, batch_size)
        super().__init__(batches.map(self._rows), "solutions", mark)

    def _rows(self, index: np.ndarray) -> PackedRows:
        pairs = [self._pairs[i] for i in index]
        if self._packed:
            lengths = [len(p) + len(c) for p, c, _ in pairs]
            rows = first_fit(lengths, self._width)
            count = row_count(len(rows), self._unit)
        else:
            rows = [[i] for i in range(len(pairs))]
            count = len(rows)
        shape = count, self._width
        return pack(pairs, rows, shape=shape, pad_id=self._pad_id)


def _pair(solution: Solution, eos_ids: Sequence[int], length: int) -> Pair:
    """Return a solution's tokens up to the first end, fitted to a row."""
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
