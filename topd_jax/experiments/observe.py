"""A student completes held-out prompts and the teachers look ahead.

What the token map shows, and what probe, local correction and detectors
measure. Nothing is trained.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from topd_jax.data.prompts import ordered_batches
from topd_jax.data.routing import places_of
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import Tokenizer
from topd_jax.data.toy_world import truth
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.objective import NearFuture, Objective, Transport
from topd_jax.parallel import hosts
from topd_jax.parallel.sharding import spread_rows
from topd_jax.sampling import Stream, stream_key
from topd_jax.training.config import Settings, check_fits
from topd_jax.training.score import score
from topd_jax.training.setup import Setup
from topd_jax.types import Scored, Teacher, Trajectories


class Observed(NamedTuple):
    """A batch on the host.

    Attributes:
      records: of its B prompts.
      trajectories: the student's completions.
      scored: what the teacher says of them, one entry an objective; without
        heads and hidden states.
    """

    records: list[Record]
    trajectories: Trajectories
    scored: list[Scored]

    def labels(self, tokenizer: Tokenizer, window: int) -> truth.TruthLabels:
        """Return the truth of every token, of problems of the tiny world."""
        return truth.label_batch(
            [record["prompt"] for record in self.records],
            self.trajectories.tokens, self.trajectories.mask, tokenizer,
            window=window,
        )  # fmt: skip


def looking_ahead(settings: Settings) -> Objective:
    """Return a run's objective as one that compares futures by transport.

    Args:
      settings: of any run; one that does not look ahead gets the defaults of
        :class:`~topd_jax.objectives.objective.NearFuture`.

    Returns:
      An objective with ``near_future``, without weights and guidance.

    Raises:
      ValueError: where it looks further than completions are long.
    """
    objective = make_objective(settings.objective)
    ahead = objective.near_future or NearFuture()
    if not isinstance(ahead.detector, Transport):
        ahead = dataclasses.replace(ahead, detector=Transport())
    objective = dataclasses.replace(
        objective, token_weights=(), near_future=ahead, guidance=None
    )
    check_fits(objective, settings)
    return objective


def observe(
    settings: Settings,
    setup: Setup,
    student: Any,
    count: int,
    objectives: Sequence[Objective],
) -> Iterator[Observed]:
    """Complete and score the first test prompts, batch by batch.

    With several teachers each batch is of one of them, who reads it.

    Args:
      settings: of the run; batches are ``eval.batch_size`` rows.
      setup: of the run.
      student: the model.
      count: prompts, from the first on.
      objectives: from :func:`looking_ahead`; the teacher looks ahead for each
        of them.

    Yields:
      The batches, without the rows that only fill the last one.
    """
    writer = setup.evaluator(settings).writer
    look = functools.partial(
        _look,
        branch_sharding=settings.rollout.branch_sharding,
        eos_ids=setup.tokenizer.eos_ids,
        pad_id=setup.tokenizer.pad_id,
    )
    looks = [jax.jit(functools.partial(look, objective=o)) for o in objectives]
    stream = stream_key(jax.random.key(settings.seed), Stream.OBSERVE)
    size = settings.eval.batch_size
    for i, (teacher, batch, prompts) in enumerate(_batches(setup, count, size)):
        keys = jax.random.split(jax.random.fold_in(stream, i))
        rows = spread_rows(batch.prompts, setup.mesh)
        written = writer(student, rows, keys[0])
        scored, real = [], batch.index >= 0
        for look in looks:
            (notes,) = look(student, (teacher,), written, real, keys[1])
            # Hidden states are wide and stay on the device.
            scored.append(notes.replace(teacher_head=None, teacher_hidden=None))
        written, scored = jax.tree.map(
            lambda x, real=real: x[real], hosts.on_host((written, scored))
        )
        records = [prompts.records[j] for j in batch.index[real]]
        yield Observed(records, written, scored)


def _look(
    student: Any,
    teachers: tuple[Teacher, ...],
    written: Trajectories,
    real: jax.Array,
    key: jax.Array,
    **options: Any,
) -> tuple[Scored, ...]:
    """Score rows; those that only fill the batch have no candidates.

    The percentile of the batch's distances would count them.
    """
    written = written.replace(mask=written.mask & real[:, None])
    return score(student, teachers, written, key, **options)


def _batches(setup: Setup, count: int, size: int) -> Iterator[tuple]:
    """Yield (teacher, batch, its prompts), every teacher's in turn."""
    teachers = {t.name: t for t in setup.teachers}
    for name, places in places_of(setup.test.records[:count]).items():
        if name in teachers:  # a prompt may be of none
            prompts = setup.test.take(places)
            for batch in ordered_batches(prompts, batch_size=size):
                yield teachers[name], batch, prompts
