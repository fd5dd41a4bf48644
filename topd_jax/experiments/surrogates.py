"""Cheaper signs of a fork, beside transport, where the truth is known (ours).

Transport asks the teacher for a future of its own; these ask less:

* ``loss``: -log p_T(y_t) of the candidate itself, which costs nothing;
* ``future_loss``: its mean over the K tokens that the student wrote from
  there, which costs nothing either;
* ``reverse_kl``, ``future_kl``: the same of the full-vocabulary divergence;
* ``teacher_entropy``: a teacher that is undecided sees no fork;
* ``hidden_distance``: 1 - cosine of the teacher's mean state over the
  student's window and over its own: branches, and no transport;
* ``loss_and_distance``: the sum of the ranks of loss and distance.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from topd_jax.data.prompts import ordered_batches
from topd_jax.experiments import detectors
from topd_jax.losses import near_future
from topd_jax.models.decoder import cast
from topd_jax.objectives.baselines import token_statistics
from topd_jax.objectives.objective import Objective
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.score import annotate, read
from topd_jax.training.setup import Pair
from topd_jax.types import Annotations, Trajectories

# Problems on which the detector is held against the truth.
_PROBLEMS = 1000
# Apart from the streams of training, evaluation and observation.
_STREAM = 2**31 - 2


def surrogate_scores(
    student: Any,
    teacher: Any,
    trajectories: Trajectories,
    notes: Annotations,
    objective: Objective,
) -> dict[str, jax.Array]:
    """What each cheaper detector says of every candidate.

    Args:
      student: the model that wrote.
      teacher: the frozen model.
      trajectories: what the student wrote.
      notes: with candidates and ``teacher_window_hidden``.
      objective: for ``window`` and ``log_floor``.

    Returns:
      name -> f32[B, M]; see the module.
    """
    mask, found = trajectories.mask, notes.candidates
    length = objective.window
    statistics = token_statistics(
        read(student, trajectories), student.head,
        notes.teacher_hidden, teacher.head, trajectories.tokens, objective,
    )  # fmt: skip

    def at(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, found.positions, axis=1)

    def ahead(values: jax.Array) -> jax.Array:
        return near_future.future_loss(values, mask, found, length=length)

    loss, divergence = notes.teacher_token_loss, statistics["reverse_kl"]
    return {
        "loss": at(loss),
        "future_loss": ahead(loss),
        "reverse_kl": at(divergence),
        "future_kl": ahead(divergence),
        "teacher_entropy": at(statistics["teacher_entropy"]),
        "hidden_distance": _hidden_distance(notes, length),
    }


def _hidden_distance(notes: Annotations, length: int) -> jax.Array:
    """f32[B, M]: 1 - cosine of the teacher's mean states, 0..2."""
    ours = near_future.slice_windows(
        notes.teacher_hidden, notes.candidates.positions, length
    )

    def mean(states: jax.Array, mask: jax.Array) -> jax.Array:
        # The first state is of both: it predicts the token they part at.
        states, mask = states[..., 1:, :], mask[..., 1:, None]
        total = jnp.sum(jnp.where(mask, states, 0), -2, dtype=jnp.float32)
        return (
            total
            / jnp.maximum(jnp.linalg.norm(total, axis=-1), 1e-6)[..., None]
        )

    return 1 - jnp.sum(
        mean(ours, notes.student_windows.mask)
        * mean(notes.teacher_window_hidden, notes.teacher_windows.mask),
        axis=-1,
    )


def measure_detector(settings: Settings, pair: Pair) -> dict[str, Any]:
    """Holds detectors against the truth on the start's rollouts.

    Args:
      settings: of a run in the tiny world whose objective looks ahead.
      pair: of the run; its student writes the test problems.

    Returns:
      JSON-able: :func:`topd_jax.experiments.detectors.report`, a histogram of
      distances by truth, and "cost": seconds of the annotation with and
      without looking ahead.
    """
    objective = dataclasses.replace(
        settings.objective, context="teacher", branch_loss="forward_kl"
    )
    write, look, score = _programs(settings, pair, objective)
    parts, seconds = [], []
    size = settings.eval.batch_size
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)
    for i, batch in enumerate(ordered_batches(pair.test, batch_size=size)):
        if i * size >= _PROBLEMS:
            break
        keys = jax.random.split(jax.random.fold_in(key, i))
        written = write(pair.student, pair.place(batch.prompts), keys[0])
        asked = (pair.student, pair.teacher, written)
        notes = look(*asked, keys[1], objective=objective)
        scores = score(*asked, notes)
        seconds.append(_seconds(look, (*asked, keys[1]), objective))
        real = batch.index >= 0  # the others only fill the last batch
        written, notes, scores = jax.tree.map(
            lambda x, real=real: x[real],
            jax.device_get((written, notes, scores)),
        )
        parts.append(
            detectors.judge(
                [pair.test.records[j]["prompt"] for j in batch.index[real]],
                written,
                notes,
                pair.tokenizer,
                window=objective.window,
                scores=scores,
            )
        )
    judged = detectors.concatenate(parts)
    judged.scores["loss_and_distance"] = rankdata(judged.loss) + rankdata(
        judged.distance
    )
    plain, ahead = np.median(seconds, axis=0)
    return detectors.report(judged) | {
        "histogram": _histogram(judged),
        "cost": {"plain": float(plain), "ahead": float(ahead)},
    }


def _programs(
    settings: Settings, pair: Pair, objective: Objective
) -> tuple[Callable, Callable, Callable]:
    """Jitted: the rollout, the annotation of any objective, the scores."""
    ids = {"eos_ids": pair.tokenizer.eos_ids, "pad_id": pair.tokenizer.pad_id}
    options = settings.rollout

    def write(student: Any, prompts: Any, key: jax.Array) -> Trajectories:
        return rollout(
            cast(student, student.config.dtype), prompts, key,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, top_p=options.top_p,
            top_k=options.top_k, **ids,
        )  # fmt: skip

    look = functools.partial(annotate, **ids)
    score = functools.partial(surrogate_scores, objective=objective)
    return (
        jax.jit(write),
        jax.jit(look, static_argnames="objective"),
        jax.jit(score),
    )


def _seconds(
    look: Callable, arguments: tuple, objective: Objective
) -> tuple[float, float]:
    """Of one annotation without and with looking ahead, one after the other."""
    found = []
    for variant in ("opd", objective.variant):
        goal = dataclasses.replace(objective, variant=variant)
        jax.block_until_ready(look(*arguments, objective=goal))  # compiles
        started = time.perf_counter()
        jax.block_until_ready(look(*arguments, objective=goal))
        found.append(time.perf_counter() - started)
    return found[0], found[1]


def _histogram(judged: detectors.Judged) -> dict[str, list]:
    edges = np.linspace(0.0, 1.2, 49)
    surface, fork = (
        np.histogram(judged.distance[judged.window_fork == v], edges)[0]
        for v in (False, True)
    )
    return {
        "edges": edges.round(4).tolist(),
        "surface": surface.tolist(),
        "fork": fork.tolist(),
    }
