"""Evaluation on held-out prompts: what the student writes, and how good it is.

One sampled completion a problem: accuracy with its interval where the answers
can be graded, and the student against the teacher on those same completions
(reverse KL, teacher's negative log-likelihood, entropies, length, distinct
n-grams), so that a collapse shows even where accuracy is at chance.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.data import prompts as prompt_data
from topd_jax.data.routing import places_of
from topd_jax.evaluation.metrics import distinct_ngrams, statistics
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import merge_lora
from topd_jax.parallel import apart
from topd_jax.parallel.hosts import on_host
from topd_jax.parallel.transfers import within_reach
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.logging import merge, read_metrics
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import Teachers, by_name, shared_rows, total
from topd_jax.types import Trajectories

# Apart from every training step's key, which are folded from 1 up.
_EVAL_STREAM = 2**31 - 1


class Evaluator:
    """Evaluates a student on the same held-out problems each time."""

    def __init__(self, settings: Settings, pair: Pair) -> None:
        """Prepares the jitted sampler.

        Args:
          settings: of the run.
          pair: models, tokenizer and held-out problems.
        """
        self._settings, self._pair = settings, pair
        self._statistics = make_statistics(settings)
        if pair.teacher_mesh is not None:
            self._statistics = apart.make_statistics(settings, pair)
        key = jax.random.key(settings.seed)
        self._key = jax.random.fold_in(key, _EVAL_STREAM)
        self._write = make_writer(
            settings,
            vocab_size=shared_rows(pair.student, pair.teacher),
            eos_ids=pair.tokenizer.eos_ids,
            pad_id=pair.tokenizer.pad_id,
        )

    def __call__(
        self,
        student: Any,
        step: int,
        *,
        final: bool = False,
        temperature: float | None = None,
    ) -> dict[str, Any]:
        """Evaluates.

        Args:
          student: the model.
          step: for the record.
          final: use the test problems, ``eval.final_problems`` of them.
          temperature: of the sampler; None takes ``eval.temperature``.

        Returns:
          JSON-able: step, final, problems, and every statistic; exact_match
          with its Wilson 95 % interval (low, high) where answers are known.
        """
        row, _ = self.write_down(
            student, step, final=final, temperature=temperature, keep=0
        )
        return row

    def write_down(
        self,
        student: Any,
        step: int,
        *,
        final: bool = False,
        temperature: float | None = None,
        keep: int,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluates, and keeps some of what was written.

        Args:
          student: as in :meth:`__call__`.
          step: as there.
          final: as there.
          temperature: as there.
          keep: problems to keep, from the first on.

        Returns:
          (what :meth:`__call__` returns; of each kept problem "step",
          "final", "problem", "answer", "completion", "right" (None where
          answers are not known) and "truncated", JSON-able).
        """
        options, pair = self._settings.eval, self._pair
        if temperature is None:
            temperature = options.temperature
        count = options.final_problems if final else options.problems
        encoded = pair.test if final else pair.validation
        rows, statistics = self.complete(student, encoded, count, temperature)
        problems = encoded.records[: len(rows)]
        texts = [pair.tokenizer.decode(r) for r in rows]
        grades = pair.grade(problems, texts)
        own = {}
        if isinstance(pair.teacher, Teachers):
            own = by_name(
                {
                    name: self._summary(
                        [rows[i] for i in places],
                        grades and [grades[i] for i in places],
                    )
                    for name, places in places_of(problems).items()
                }
            )
        row = {
            "step": step,
            "final": final,
            "temperature": float(temperature),
            **statistics,
            **self._summary(rows, grades),
            **own,
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
            **_accuracy(grades),
        }

    def complete(
        self,
        student: Any,
        encoded: prompt_data.EncodedPrompts,
        count: int,
        temperature: float,
    ) -> tuple[list[list[int]], dict[str, float | None]]:
        """Lets the student complete prompts, one completion each.

        Args:
          student: the model; or several, of whom each completes its own.
          encoded: the prompts.
          count: how many of them, from the first on.
          temperature: of the sampler; 0 is greedy.

        Returns:
          (token ids of each completion, the end included; statistics of the
          student against the teacher on all of them, name -> number). With
          several teachers these are against each prompt's own, and of every
          teacher's prompts as "name/teacher"; prompts without one have none.
        """
        size = self._settings.eval.batch_size
        parts, rows, number = [], {}, itertools.count()
        groups = self._pair.by_teacher(encoded, count)
        for name, teacher, prompts, places in groups:
            several = isinstance(student, Teachers)
            model = student.models[name] if several else student
            batches = prompt_data.ordered_batches(prompts, batch_size=size)
            last = -(-len(places) // size)
            for batch in itertools.islice(batches, last):
                written = self._write(
                    model,
                    self._pair.spread(batch.prompts),
                    jax.random.fold_in(self._key, next(number)),
                    jnp.float32(temperature),
                )
                real = (batch.index >= 0) & (batch.index < len(places))
                written = written.replace(mask=written.mask & real[:, None])
                if teacher is not None:
                    found = self._statistics(model, teacher, written)
                    parts += [found] + (
                        [by_name({name: found})] if name else []
                    )
                done = _completions(written, int(real.sum()))
                at = [places[j] for j in batch.index[real]]
                rows |= zip(at, done, strict=True)
        statistics = read_metrics(merge(within_reach(parts)))
        return [rows[i] for i in sorted(rows)], statistics

    def is_cut(self, tokens: list[int]) -> bool:
        """Whether a completion reached the limit without an end."""
        limit = self._settings.rollout.max_new_tokens
        ends = self._pair.tokenizer.eos_ids
        return len(tokens) == limit and tokens[-1] not in ends


def make_writer(
    settings: Settings,
    *,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[..., Trajectories]:
    """The jitted sampler of a run's evaluations.

    Args:
      settings: of the run.
      vocab_size: ids from here on are never drawn.
      eos_ids: end-of-sequence ids.
      pad_id: id put where nothing is.

    Returns:
      (student, prompts, key, temperature) -> trajectories.
    """

    def write(
        student: Any, prompts: Any, key: jax.Array, temperature: jax.Array
    ) -> Trajectories:
        return rollout(
            in_compute_dtype(merge_lora(student)),
            prompts,
            key,
            max_new_tokens=settings.rollout.max_new_tokens,
            temperature=temperature,
            eos_ids=eos_ids,
            pad_id=pad_id,
            vocab_size=vocab_size,
            sharding=settings.rollout.sharding,
        )

    return jax.jit(write)


def make_statistics(settings: Settings) -> Callable[..., dict]:
    """The jitted :func:`topd_jax.evaluation.metrics.statistics` of a run.

    Args:
      settings: of the run.

    Returns:
      (student, teacher, trajectories) -> name -> (sum, count); of several
      teachers, also "name/teacher".
    """
    options = dict(
        top_k=settings.log.top_k, log_floor=settings.objective.log_floor
    )

    def of(student: Any, teacher: Any, trajectories: Trajectories) -> dict:
        if not isinstance(teacher, Teachers):
            return statistics(student, teacher, trajectories, **options)
        parts = {
            name: statistics(student, teacher.models[name], rows, **options)
            for name, rows in teacher.split(trajectories).items()
        }
        return total(parts.values()) | by_name(parts)

    return jax.jit(of)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927).

    Args:
      correct: successes.
      total: trials, above 0.

    Returns:
      (low, high), 0..1.
    """
    z = 1.959964
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(
        share * (1 - share) / total + z * z / (4 * total * total)
    )
    scale = 1 + z * z / total
    return (centre - spread) / scale, (centre + spread) / scale


def _completions(written: Trajectories, count: int) -> list[list[int]]:
    tokens, mask = on_host((written.tokens, written.mask))
    return [tokens[i][mask[i]].tolist() for i in range(count)]


def _accuracy(grades: list[bool] | None) -> dict[str, Any]:
    if grades is None:
        return {"exact_match": None}
    correct = sum(grades)
    bits = "".join("1" if g else "0" for g in grades)
    low, high = wilson(correct, len(grades))
    return {
        "exact_match": correct / len(grades),
        "correct": correct,
        "exact_match_low": low,
        "exact_match_high": high,
        # One bit a problem, in order: paired comparisons need them.
        "grades": f"{int(bits, 2):0{-(-len(bits) // 4)}x}",
    }
