"""Batches of prompts.

Records (:mod:`topd_jax.data.sources`) are tokenized once, and every batch is
``data.max_prompt_length`` columns wide, so that a run compiles once. A stream
never ends: its order is a function of the seed alone, its state is one number,
and every process makes the same batches. Neither a resume nor another number
of processes changes what a step sees.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from topd_jax.data.routing import places_of
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import Tokenizer
from topd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Tokenized records.

    Attributes:
      records: those that were kept.
      ids: of each record, i32[its length], the chat template applied.
      pad_id: the id that fills batches.
      max_length: of a prompt, in tokens; the width of every batch.
      skipped: how many records were left out because they were too long.
      teacher_ids: of each record, what its teacher reads instead,
        i32[its length]; None where all read the prompt.
      teacher_width: of what teachers read, in tokens.
    """

    records: tuple[Record, ...]
    ids: tuple[np.ndarray, ...]
    pad_id: int
    max_length: int
    skipped: int
    teacher_ids: tuple[np.ndarray, ...] | None = None
    teacher_width: int = 0

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any prompt or its place."""
        return fingerprint(self.ids)

    def mark(self) -> str:
        """Return 16 hex digits that change with any record's texts or place.

        Unlike its ids, they do not change with a chat template.
        """
        keys = "prompt", "teacher_prompt", "teacher"
        texts = [[record.get(key) for key in keys] for record in self.records]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    def take(self, places: Sequence[int]) -> "EncodedPrompts":
        """Return some of the prompts, in the order of ``places``."""
        return dataclasses.replace(
            self,
            records=tuple(self.records[i] for i in places),
            ids=tuple(self.ids[i] for i in places),
            teacher_ids=self.teacher_ids
            and tuple(self.teacher_ids[i] for i in places),
        )

    @property
    def for_teacher(self) -> "EncodedPrompts":
        """The prompts as teachers read them, for one that is to write."""
        if self.teacher_ids is None:
            return self
        return dataclasses.replace(
            self,
            ids=self.teacher_ids,
            max_length=self.teacher_width,
            teacher_ids=None,
        )


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts and where they come from.

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
    teacher_width: int = 0,
    on_long_prompt: str = "error",
) -> EncodedPrompts:
    """Tokenize records, the chat template applied.

    Args:
      records: questions.
      tokenizer: of the student.
      max_length: of a prompt, in tokens, at least 1.
      teacher_width: the same of what a teacher reads instead; 0: max_length.
      on_long_prompt: what a longer one is: "error", or "skip", which leaves
        it out and counts it.

    Raises:
      ValueError: for a prompt that is too long, with its source, length and
        the ways out; if none is left.
    """
    limits = {"prompt": (max_length, "data.max_prompt_length")}
    if any("teacher_prompt" in record for record in records):
        setting = "data.max_teacher_prompt_length"
        limits["teacher_prompt"] = teacher_width or max_length, setting
    kept, encoded = [], []
    for record in records:
        rows = [
            _encode(record, key, tokenizer, *limit, on_long_prompt)
            for key, limit in limits.items()
        ]
        if all(ids is not None for ids in rows):
            kept.append(record)
            encoded.append(rows)
    skipped = len(records) - len(kept)
    most, settings = (
        " or ".join(map(str, part))
        for part in zip(*limits.values(), strict=True)
    )
    if not kept:
        raise ValueError(
            f"no prompt is left: {skipped} of {len(records)} are longer than "
            f"{most} tokens; raise {settings}"
        )
    if skipped:
        logging.warning(
            "skipping %d of %d prompts, which are longer than %s tokens",
            skipped,
            len(records),
            most,
        )
    ids, *own = zip(*encoded, strict=True)
    return EncodedPrompts(
        tuple(kept), ids, tokenizer.pad_id, max_length, skipped,
        own[0] if own else None, teacher_width or max_length,
    )  # fmt: skip


def _encode(
    record: Record,
    key: str,
    tokenizer: Tokenizer,
    limit: int,
    setting: str,
    on_long_prompt: str,
) -> np.ndarray | None:
    """Return a record's prompt, or its teacher's; None for one to skip."""
    ids = np.asarray(
        tokenizer.chat(record.get(key, record["prompt"])), np.int32
    )
    what = f"{key} {record['index']} ({record['source']})"
    if not len(ids):
        raise ValueError(
            f"{what} has no tokens; the chat template must write at least one"
        )
    if len(ids) <= limit:
        return ids
    if on_long_prompt == "error":
        raise ValueError(
            f"{what} has {len(ids)} tokens; the limit is {limit}: raise "
            f'{setting}, or set data.on_long_prompt="skip"'
        )
    return None


def pad_prompts(
    ids: Sequence[np.ndarray], *, pad_id: int, width: int
) -> Prompts:
    """Pad prompts on the left to one batch.

    Args:
      ids: of each prompt, i32[its length].
      pad_id: the id of the padding.
      width: columns of the batch, at least the longest length.

    Returns:
      Prompts of NumPy arrays i32[B, width] and bool[B, width].
    """
    tokens = np.full((len(ids), width), pad_id, np.int32)
    mask = np.zeros((len(ids), width), bool)
    for row, prompt in enumerate(ids):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return Prompts(tokens=tokens, mask=mask)


class Stream:
    """Iterate over batches without an end, from any position.

    A position is one number, and a mark of the data that batches are made of.
    """

    def __init__(self, batches: grain.MapDataset, kind: str, mark: str) -> None:
        """Start at the first batch.

        Args:
          batches: all of them; they are made in a thread, two ahead.
          kind: what they are made of, in the plural.
          mark: that changes with it.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._batches = iter(batches.to_iter_dataset(options))
        self._kind, self._mark = kind, mark

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Return the position, JSON-able."""
        return {self._kind: self._mark, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
          ValueError: for a position in other data.
        """
        there = state.get(self._kind)
        if there != self._mark:
            raise ValueError(
                f"the checkpoint was made with other {self._kind} (fingerprint "
                f"{there} there, {self._mark} here); use another --workdir, or "
                "the data.path or offline.path it was started with"
            )
        self._batches.set_state(state["batches"])


def prompt_stream(
    encoded: EncodedPrompts,
    *,
    batch_size: int,
    seed: int,
    prompts_per_teacher: Mapping[str, int] | None = None,
) -> Stream:
    """Return an endless iterator over batches, each epoch shuffled anew.

    Args:
      encoded: the prompts.
      batch_size: prompts of a batch.
      seed: of the order; nothing else changes it.
      prompts_per_teacher: name of a teacher -> its prompts in every batch. Rows
        are in this order, and each teacher's prompts are shuffled on their
        own, by seed and name. None or {} where there is one teacher.

    Returns:
      An iterator of :class:`PromptBatch` with ``batch_size`` rows each.

    Raises:
      ValueError: for a teacher without prompts.
    """
    if prompts_per_teacher:
        index = _routed(encoded, seed, prompts_per_teacher)
    else:
        index = shuffled(range(len(encoded.ids)), seed, batch_size)
    batches = index.map(functools.partial(_batch, encoded))
    return Stream(batches, "prompts", encoded.mark())


def ordered_batches(
    encoded: EncodedPrompts, *, batch_size: int
) -> Iterator[PromptBatch]:
    """Yield every prompt once, in order: for evaluation.

    The last batch is filled up with copies of the last prompt, index -1, so
    that all have the same number of rows.

    Args:
      encoded: the prompts.
      batch_size: rows of each batch.
    """
    count = len(encoded.ids)
    for begin in range(0, count, batch_size):
        index = np.arange(begin, begin + batch_size)
        batch = _batch(encoded, np.minimum(index, count - 1))
        yield dataclasses.replace(
            batch, index=np.where(index < count, index, -1).astype(np.int32)
        )


def fingerprint(rows: Iterable[np.ndarray]) -> str:
    """Return 16 hex digits that change with any id or its place.

    Args:
      rows: ids, i32[its length] each.
    """
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.hexdigest()[:16]


def _batch(encoded: EncodedPrompts, index: np.ndarray) -> PromptBatch:
    def padded(ids: Sequence[np.ndarray], width: int) -> Prompts:
        rows = [ids[i] for i in index]
        return pad_prompts(rows, pad_id=encoded.pad_id, width=width)

    prompts = padded(encoded.ids, encoded.max_length)
    if encoded.teacher_ids is not None:
        own = padded(encoded.teacher_ids, encoded.teacher_width)
        prompts = prompts.replace(teacher=own)
    return PromptBatch(prompts, index.astype(np.int32))


def shuffled(
    places: Sequence[int], seed: int, batch_size: int
) -> grain.MapDataset:
    """Batch places without an end, each epoch in another order.

    Args:
      places: what batches are made of.
      seed: of the order; nothing else changes it.
      batch_size: places of a batch.
    """
    # drop_remainder: an endless stream has none, but counting its batches any
    # other way overflows for batch_size 1.
    return (
        grain.MapDataset.source(places)
        .shuffle(seed=seed)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )


def _routed(
    encoded: EncodedPrompts, seed: int, prompts_per_teacher: Mapping[str, int]
) -> grain.MapDataset:
    """Return batches in which every teacher has its own number of rows."""
    places = places_of(encoded.records)
    parts = []
    for name, rows in prompts_per_teacher.items():
        if name not in places:
            raise ValueError(
                f"no prompt of the teacher {name!r} is left; raise "
                "data.max_prompt_length, or take config.teachers."
                f"{name} out"
            )
        # A seed of its own: another teacher's prompts do not change it.
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        teacher_seed = int.from_bytes(digest[:4], "big")
        parts.append(shuffled(places[name], teacher_seed, rows))
    # All of them are endless, and a zip needs one length.
    steps = min(map(len, parts))
    parts = [part[:steps] for part in parts]
    return grain.experimental.ZipMapDataset(parts).map(np.concatenate)
