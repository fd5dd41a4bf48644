"""Prompts as batches (ours).

Records (:mod:`topd_jax.data.sources`) are tokenised once; a stream gives
batches for ever. The stream's order is a function of the seed alone, its
state is one number, and every process of a pod takes its own rows of the same
global batch: neither a resume nor another number of processes changes what a
step sees.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import logging

from topd_jax.data.routing import places_of
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import Tokenizer
from topd_jax.sampling.prompts import bucket
from topd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Tokenised records.

    Attributes:
      records: those that were kept.
      ids: of each record, i32[its length], the chat template applied.
      pad_id: the id that fills batches.
      max_length: the limit that all of them respect.
      skipped: how many records were left out because they were too long.
    """

    records: tuple[Record, ...]
    ids: tuple[np.ndarray, ...]
    pad_id: int
    max_length: int
    skipped: int

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any prompt or its place."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
        return digest.hexdigest()[:16]

    def take(self, places: Sequence[int]) -> "EncodedPrompts":
        """Some of the prompts, in the order of ``places``."""
        return dataclasses.replace(
            self,
            records=tuple(self.records[i] for i in places),
            ids=tuple(self.ids[i] for i in places),
        )


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts with the records they are of.

    Attributes:
      prompts: NumPy i32[B, P] and bool[B, P], padded on the left.
      index: i32[B] place of each row in ``EncodedPrompts.records``; -1 in
        rows that only fill the last batch of :func:`ordered_batches`.
    """

    prompts: Prompts
    index: np.ndarray


def encode_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_long_prompt: str = "error",
) -> EncodedPrompts:
    """Tokenises records, the chat template applied.

    Args:
      records: questions.
      tokenizer: of the student.
      max_length: the longest prompt allowed, in tokens.
      on_long_prompt: "error", or "skip", which leaves longer ones out and
        counts them.

    Raises:
      ValueError: for a prompt that is too long, with its source, length and
        the ways out; if none is left; for another ``on_long_prompt``.
    """
    if on_long_prompt not in ("error", "skip"):
        raise ValueError(
            f'on_long_prompt={on_long_prompt!r} must be "error" or "skip"'
        )
    kept, encoded = [], []
    for record in records:
        ids = np.asarray(tokenizer.chat(record["prompt"]), np.int32)
        if len(ids) <= max_length:
            kept.append(record)
            encoded.append(ids)
        elif on_long_prompt == "error":
            raise ValueError(
                f"prompt {record['index']} ({record['source']}) has "
                f"{len(ids)} tokens; the limit is {max_length}: raise "
                'data.max_prompt_length, or set data.on_long_prompt="skip"'
            )
    skipped = len(records) - len(kept)
    if not kept:
        raise ValueError(
            f"no prompt is left: {skipped} of {len(records)} are longer than "
            f"max_length={max_length} tokens; raise data.max_prompt_length"
        )
    if skipped:
        logging.warning(
            "%d of %d prompts are longer than %d tokens and are left out",
            skipped,
            len(records),
            max_length,
        )
    return EncodedPrompts(
        tuple(kept), tuple(encoded), tokenizer.pad_id, max_length, skipped
    )


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Widths 16, 32, 64, ... below ``max_length``, and itself."""
    widths = []
    while 16 << len(widths) < max_length:
        widths.append(16 << len(widths))
    return (*widths, max_length)


def pad_prompts(
    ids: Sequence[np.ndarray], *, pad_id: int, width: int
) -> Prompts:
    """Prompts as one batch, padded on the left to ``width`` columns.

    Returns:
      Prompts of NumPy arrays i32[B, width] and bool[B, width].
    """
    tokens = np.full((len(ids), width), pad_id, np.int32)
    mask = np.zeros((len(ids), width), bool)
    for row, prompt in enumerate(ids):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return Prompts(tokens=tokens, mask=mask)


def prompt_stream(
    encoded: EncodedPrompts,
    *,
    batch_size: int,
    seed: int,
    shares: Mapping[str, int] | None = None,
    buckets: Sequence[int] | None = None,
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches for ever, shuffled anew each epoch by the seed.

    The iterator is grain's: ``get_state()`` gives a small JSON-able dict and
    ``set_state`` goes on from there with the identical batches; orbax saves
    it through ``grain.checkpoint``.

    Args:
      encoded: the prompts.
      batch_size: rows of the global batch.
      seed: of the order; nothing else enters it.
      shares: teacher -> how many of the batch's rows hold its prompts, which
        are shuffled apart from those of others, by seed and name; rows are in
        the order of ``shares``. None where there is one teacher.
      buckets: widths that a batch may have, so that a new length does not
        recompile; None takes :func:`default_buckets`.
      parts: consecutive slices of the batch, each of which the processes
        share.
      process_index: which of the processes this is.
      process_count: how many share each batch, this one getting rows
        ``[index * B / count, (index + 1) * B / count)``, of every slice.

    Returns:
      An iterator of :class:`PromptBatch` with ``batch_size / process_count``
      rows each.

    Raises:
      ValueError: for a slice that the processes cannot share equally, a
        prompt that no bucket holds, or a teacher without prompts.
    """
    own = _own_rows(batch_size, process_index, process_count, parts)
    widths = tuple(buckets or default_buckets(encoded.max_length))
    bucket(max(map(len, encoded.ids)), widths)

    def collate(index: np.ndarray) -> PromptBatch:
        # The width is the global batch's: all processes run one program.
        width = bucket(max(len(encoded.ids[i]) for i in index), widths)
        mine = index[own]
        prompts = pad_prompts(
            [encoded.ids[i] for i in mine], pad_id=encoded.pad_id, width=width
        )
        return PromptBatch(prompts, mine.astype(np.int32))

    if shares is None:
        index = _shuffled(range(len(encoded.ids)), seed, batch_size)
    else:
        index = _routed(encoded, seed, shares)
    return iter(
        index.map(collate).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
    )


def _shuffled(
    places: Sequence[int], seed: int, batch_size: int
) -> grain.MapDataset:
    # drop_remainder: an endless stream has none, but counting its batches any
    # other way overflows for batch_size 1.
    return (
        grain.MapDataset.source(places)
        .shuffle(seed=seed)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )


def _routed(
    encoded: EncodedPrompts, seed: int, shares: Mapping[str, int]
) -> grain.MapDataset:
    """Batches in which every teacher has its own number of rows."""
    places = places_of(encoded.records)
    parts = []
    for name, rows in shares.items():
        if name not in places:
            raise ValueError(
                f"no prompt of the teacher {name!r} is left; raise "
                "data.max_prompt_length, or take config.teachers."
                f"{name} out"
            )
        # Its own order: another teacher's prompts do not change it.
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        own = int.from_bytes(digest[:4], "big")
        parts.append(_shuffled(places[name], own, rows))
    # All of them are endless, and a zip wants one length.
    steps = min(map(len, parts))
    parts = [part[:steps] for part in parts]
    return grain.experimental.ZipMapDataset(parts).map(np.concatenate)


def _own_rows(
    batch_size: int, process_index: int, process_count: int, parts: int
) -> np.ndarray:
    ways = process_count * parts
    if batch_size < 1 or batch_size % ways:
        near = max(1, round(batch_size / ways)) * ways
        what = f"{parts} parts x " if parts > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} must be divisible by {what}the number of "
            f"processes ({ways}); try {near}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must be in 0..{process_count - 1}"
        )
    rows = np.arange(batch_size).reshape(parts, process_count, -1)
    return rows[:, process_index].reshape(-1)


def ordered_batches(
    encoded: EncodedPrompts,
    *,
    batch_size: int,
    buckets: Sequence[int] | None = None,
) -> Iterator[PromptBatch]:
    """Every prompt once, in order: for evaluation.

    The last batch is filled up with copies of the last prompt, index -1, so
    that all have the same number of rows.

    Args:
      encoded: the prompts.
      batch_size: rows of each batch.
      buckets: widths a batch may have; None takes :func:`default_buckets`.
    """
    widths = tuple(buckets or default_buckets(encoded.max_length))
    for begin in range(0, len(encoded.ids), batch_size):
        ids = list(encoded.ids[begin : begin + batch_size])
        fill = batch_size - len(ids)
        index = [*range(begin, begin + len(ids)), *[-1] * fill]
        ids += [ids[-1]] * fill
        width = bucket(max(map(len, ids)), widths)
        yield PromptBatch(
            pad_prompts(ids, pad_id=encoded.pad_id, width=width),
            np.array(index, np.int32),
        )
