"""Evaluation on held-out prompts: what the student writes, and how good it is.

One sampled completion a problem: accuracy with its interval where the answers
can be graded, and the student against the teacher on those same completions
(reverse KL, teacher's negative log-likelihood, entropies, length, distinct
n-grams), so that a collapse shows even where accuracy is at chance.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from topd_jax.data import prompts as prompt_data
from topd_jax.data.routing import places_of
from topd_jax.data.teachers import by_name
from topd_jax.data.tokenizers import Tokenizer
from topd_jax.evaluation.metrics import (
    accuracy,
    distinct_ngrams,
    merge,
    read_metrics,
    statistics,
)
from topd_jax.evaluation.settings import EvalSettings
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import merge_lora
from topd_jax.models.passes import trajectory_states
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.compilation import decoding_options, jitted
from topd_jax.parallel.hosts import from_first, on_host
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.sharding import constrain_rows, spec_on, spread_rows
from topd_jax.sampling import Stream, rollout, stream_key
from topd_jax.sampling.settings import RolloutSettings
from topd_jax.types import ONE_DEVICE, Layout, Prompts, Teacher, Trajectories

Grader = Callable[[Sequence[Any], Sequence[str]], list[bool] | None]


def write(
    model: LanguageModel,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array | None = None,
    *,
    options: RolloutSettings,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
) -> Trajectories:
    """Let a model write completions; jit it with its options bound.

    Args:
      model: adapters are merged and parameters cast to compute dtype first.
      prompts: B prompts.
      key: PRNG key.
      temperature: of the sampler; None takes ``options.temperature``.
      options: length, sampling and sharding.
      vocab_size: ids from here on are never drawn.
      eos_ids: end-of-sequence ids.
      pad_id: id put where no token is.
      samples: completions a prompt.

    Returns:
      B * samples rows.
    """
    sampled = temperature is None
    return rollout(
        in_compute_dtype(merge_lora(model)),
        prompts,
        key,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature if sampled else temperature,
        top_p=options.top_p if sampled else 1.0,
        top_k=options.top_k if sampled else 0,
        samples=samples,
        vocab_size=vocab_size,
        sharding=options.sharding,
        slots=options.slots,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def compare(
    student: LanguageModel,
    teacher: LanguageModel,
    trajectories: Trajectories,
    real: jax.Array | None = None,
    start: jax.Array | None = None,
    *,
    top_k: int,
    layout: Layout = ONE_DEVICE,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Compute :func:`~topd_jax.evaluation.metrics.statistics` of trajectories.

    Args:
      student: the model.
      teacher: the frozen model.
      trajectories: that both read, each after its own prompt.
      real: bool[B] rows that count; None counts all.
      start: i32[] reads only the rows from here on that ``real`` is about.
      top_k: size of the top sets.
      layout: of the fused pass.

    Returns:
      name -> (sum, count).
    """
    if start is not None:

        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, len(real))

        trajectories = constrain_rows(jax.tree.map(part, trajectories))
    if real is not None:
        mask = trajectories.mask & real[:, None]
        trajectories = trajectories.replace(mask=mask)
    return statistics(
        trajectory_states(student, trajectories),
        student.head,
        trajectory_states(teacher, trajectories.for_teacher),
        teacher.head,
        trajectories.tokens,
        trajectories.mask,
        layout=layout,
        top_k=top_k,
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a student on the same held-out problems each time.

    Attributes:
      options: how many problems, how they are sampled.
      rollout: length and sharding of completions.
      teachers: of the run.
      tokenizer: of all models.
      mesh: of devices.
      validation: held-out prompts for the interval.
      test: held-out prompts for the end.
      grade: (records, completions) -> which are right, or None where answers
        are not known.
      vocab_size: ids from here on are never drawn.
      seed: of the run.
      top_k: size of the top sets in the statistics.
      chunk_size: tokens whose logits exist at a time; None chooses.
      shared: whether programs may be those of another evaluator; see
        :func:`~topd_jax.parallel.compilation.jitted`.
    """

    options: EvalSettings
    rollout: RolloutSettings
    teachers: tuple[Teacher, ...]
    tokenizer: Tokenizer
    mesh: Mesh
    validation: prompt_data.EncodedPrompts
    test: prompt_data.EncodedPrompts
    grade: Grader
    vocab_size: int
    seed: int
    top_k: int
    chunk_size: int | None = None
    shared: bool = False

    @functools.cached_property
    def writer(self) -> Callable[..., Trajectories]:
        """Write, jitted: (student, prompts, key, temperature) -> rows."""
        options = dict(
            options=self.rollout,
            vocab_size=self.vocab_size,
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
        )
        rows = NamedSharding(self.mesh, spec_on(self.mesh, ("batch",)))
        told = decoding_options(self.mesh, self.rollout.sharding)
        return jitted(
            functools.partial(write, **options),
            shared=self.shared,
            out_shardings=rows,
            compiler_options=told,
        )

    @functools.cached_property
    def comparer(self) -> Callable[..., dict]:
        """Compare, jitted: (student, teacher, rows, real) -> metrics."""
        layout = loss_layout(self.mesh, chunk_size=self.chunk_size)
        look = functools.partial(compare, top_k=self.top_k, layout=layout)
        return jitted(look, shared=self.shared)

    def evaluate(
        self,
        student: LanguageModel,
        step: int,
        *,
        final: bool = False,
        temperature: float | None = None,
        keep: int = 0,
        pause: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluate, and keep some of what was written.

        Args:
          student: the model.
          step: for the record.
          final: use the test problems, ``eval.final_problems`` of them.
          temperature: of the sampler; None takes ``eval.temperature``.
          keep: problems to keep, from the first on.
          pause: called before every batch; it may end the process.

        Returns:
          (JSON-able: step, final, problems, and every statistic; exact_match
          with its Wilson 95 % interval (low, high) where answers are known;
          of each kept problem "step", "final", "problem", "answer",
          "completion", "right" (None where answers are not known) and
          "truncated").
        """
        if temperature is None:
            temperature = self.options.temperature
        count = self.options.final_problems if final else self.options.problems
        encoded = self.test if final else self.validation
        rows, numbers = self.complete(
            student, encoded, count, temperature, pause
        )
        problems = encoded.records[: len(rows)]
        texts = [self.tokenizer.decode(r) for r in rows]
        grades = from_first(lambda: self.grade(problems, texts))
        by_teacher = {
            name: self._summary(
                [rows[i] for i in places],
                grades and [grades[i] for i in places],
            )
            for name, places in places_of(problems).items()
            if name
        }
        row = {
            "step": step,
            "final": final,
            "temperature": float(temperature),
            **numbers,
            **self._summary(rows, grades),
            **by_name(by_teacher),
        }
        return row, [
            {
                "step": step,
                "final": final,
                "problem": problems[i]["prompt"],
                "answer": problems[i]["answer"],
                "completion": texts[i],
                "right": None if grades is None else bool(grades[i]),
                "truncated": self.is_cut(rows[i]),
            }
            for i in range(min(keep, len(rows)))
        ]

    def _summary(
        self, rows: list[list[int]], grades: list[bool] | None
    ) -> dict[str, Any]:
        lengths = np.asarray([len(r) for r in rows])
        return {
            "problems": len(rows),
            "length_mean": float(lengths.mean()),
            "truncated": float(np.mean([self.is_cut(r) for r in rows])),
            "distinct_3": distinct_ngrams(rows, 3),
            **accuracy(grades),
        }

    def complete(
        self,
        student: LanguageModel,
        encoded: prompt_data.EncodedPrompts,
        count: int,
        temperature: float,
        pause: Callable[[], None] = lambda: None,
    ) -> tuple[list[list[int]], dict[str, float | None]]:
        """Let the student complete prompts, one completion each.

        Args:
          student: the model.
          encoded: the prompts.
          count: how many of them, from the first on.
          temperature: of the sampler; 0 is greedy.
          pause: called before every batch.

        Returns:
          (token ids of each completion, the end included; statistics of the
          student against the teacher on all of them, name -> number). With
          several teachers these are against each prompt's own, and of every
          teacher's prompts as "name/teacher"; prompts without one have none.
        """
        rows: dict[int, list[int]] = {}
        parts: list[dict] = []
        number = itertools.count()
        records = encoded.records[:count]
        models = {t.name: t.beside(student) for t in self.teachers}
        groups = places_of(records)
        if len(models) == 1:  # it reads all, whatever they name
            models = {"": self.teachers[0].beside(student)}
            groups = {"": list(range(len(records)))}
        for name, places in groups.items():
            for batch in prompt_data.ordered_batches(
                encoded.take(places), batch_size=self.options.batch_size
            ):
                pause()
                asked = self._asked(batch, next(number), temperature)
                written = self.writer(student, *asked)
                real = batch.index >= 0
                for part in self._parts(real) if name in models else ():
                    metrics = self.comparer(
                        student, models[name], written, *part
                    )
                    parts += [metrics, by_name({name: metrics})]
                tokens, mask = on_host((written.tokens, written.mask))
                for row, place in enumerate(batch.index[real]):
                    rows[places[place]] = tokens[row][mask[row]].tolist()
        numbers = read_metrics(merge(parts))
        return [rows[i] for i in sorted(rows)], numbers

    def _parts(self, real: np.ndarray) -> Iterator[tuple]:
        """Yield what is compared at once: no more rows than are written."""
        count = len(real)
        size = min(self.rollout.slots or count, count)
        if size == count:
            yield (real,)
            return
        for begin in range(0, count, size):
            rows = np.arange(size) + min(begin, count - size)
            yield real[rows] & (rows >= begin), rows[0].astype(np.int32)

    def _asked(
        self, batch: prompt_data.PromptBatch, number: int, temperature: float
    ) -> tuple[Prompts, jax.Array, np.float32]:
        """Return what the writer is called with, after the student."""
        key = stream_key(jax.random.key(self.seed), Stream.EVALUATE)
        return (
            spread_rows(batch.prompts, self.mesh),
            jax.random.fold_in(key, number),
            np.float32(temperature),
        )

    def trace(
        self, student: LanguageModel
    ) -> Iterator[tuple[str, list[jax.stages.Traced]]]:
        """Yield the programs of an evaluation, traced: (name, programs)."""
        size = self.options.batch_size
        batch = next(prompt_data.ordered_batches(self.test, batch_size=size))
        asked = self._asked(batch, 0, self.options.temperature)
        writer = self.writer.trace(student, *asked)
        yield "evaluation", [writer]
        read = (writer.out_info, *next(self._parts(batch.index >= 0)))
        models = [t.beside(student) for t in self.teachers]
        yield (
            "comparison",
            [self.comparer.trace(student, model, *read) for model in models],
        )

    def is_cut(self, tokens: list[int]) -> bool:
        """Return whether a completion reached the limit without an end."""
        ends = self.tokenizer.eos_ids
        limit = self.rollout.max_new_tokens
        return len(tokens) == limit and tokens[-1] not in ends
