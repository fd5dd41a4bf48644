"""A student writes held-out prompts and the teacher looks ahead, no training.

What ``topd inspect`` shows and ``topd probe`` measures.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.data.prompts import (
    EncodedPrompts,
    PromptBatch,
    ordered_batches,
)
from topd_jax.data.sources import Record
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.objectives.objective import Objective
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.score import annotate
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import shared_rows
from topd_jax.types import Annotations, Trajectories

# Apart from the streams of training, evaluation and detection.
_STREAM = 2**31 - 3


class Observed(NamedTuple):
    """A batch on the host.

    Attributes:
      records: of its B prompts.
      trajectories: what the student wrote.
      notes: what the teacher says of it, one entry a score.
    """

    records: list[Record]
    trajectories: Trajectories
    notes: list[Annotations]


def looking_ahead(objective: Objective) -> Objective:
    """The objective with branches and transport, whatever it trains by."""
    objective = dataclasses.replace(objective, detector="transport")
    if objective.pieces.looks_ahead:
        return objective
    return dataclasses.replace(objective, variant="topd", stage="on_policy")


def observe(
    settings: Settings,
    pair: Pair,
    student: Any,
    count: int,
    scores: tuple[Callable | None, ...] = (None,),
) -> Iterator[Observed]:
    """Writes and annotates the first test prompts, batch by batch.

    With several teachers each batch is of one of them, who reads it.

    Args:
      settings: of the run; batches are ``eval.batch_size`` rows.
      pair: of the run.
      student: the model.
      count: prompts, from the first on.
      scores: what candidates are ranked by, one annotation each: None for the
        objective's own, or (token_loss f32[B, T], trajectories, key) ->
        f32[B, T]; what it gives -inf is never a candidate.

    Yields:
      The batches, without the rows that only fill the last one.
    """
    eos_ids, pad_id = pair.tokenizer.eos_ids, pair.tokenizer.pad_id
    options = settings.rollout
    objective = looking_ahead(settings.objective)

    @jax.jit
    def write(student: Any, prompts: Any, key: jax.Array) -> Trajectories:
        return rollout(
            in_compute_dtype(student), prompts, key,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_p=options.top_p,
            top_k=options.top_k, eos_ids=eos_ids, pad_id=pad_id,
            vocab_size=shared_rows(student, pair.teacher),
            sharding=options.sharding,
        )  # fmt: skip

    read = jax.jit(
        functools.partial(
            annotate, objective=objective, eos_ids=eos_ids, pad_id=pad_id
        )
    )
    size = settings.eval.batch_size
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)
    for i, (teacher, batch, whose) in enumerate(_batches(pair, count, size)):
        keys = jax.random.split(jax.random.fold_in(key, i), 2 + len(scores))
        written = write(student, pair.place(batch.prompts), keys[0])
        own = read(student, teacher, written, keys[1])
        notes = [
            own
            if score is None
            else read(
                student, teacher, written, keys[1],
                score=score(own.teacher_token_loss, written, key),
            )
            for score, key in zip(scores, keys[2:], strict=True)
        ]  # fmt: skip
        real = batch.index >= 0
        # States are wide, and nobody looks at them.
        notes = [
            n.replace(teacher_hidden=jnp.zeros(len(real)),
                      teacher_window_hidden=None)
            for n in notes
        ]  # fmt: skip
        written, notes = jax.tree.map(
            lambda x, real=real: np.asarray(x)[real],
            jax.device_get((written, notes)),
        )
        records = [whose.records[j] for j in batch.index[real]]
        yield Observed(records, written, notes)


def _batches(
    pair: Pair, count: int, size: int
) -> Iterator[tuple[Any, PromptBatch, EncodedPrompts]]:
    """(teacher, batch, the prompts it is of), every teacher's in turn.

    Rows past ``count`` only fill: their index is -1.
    """
    for _, teacher, prompts, places in pair.by_teacher(pair.test, count):
        batches = ordered_batches(prompts, batch_size=size)
        for batch in itertools.islice(batches, -(-len(places) // size)):
            real = batch.index < len(places)
            index = np.where(real, batch.index, -1)
            yield teacher, dataclasses.replace(batch, index=index), prompts
