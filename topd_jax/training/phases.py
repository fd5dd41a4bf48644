"""The jitted parts of a step, and the optimizer, as the settings ask for them.

Each part lowers and compiles from shapes alone, on any device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topd_jax.data.packing import PackedRows
from topd_jax.evaluation.evaluator import make_statistics
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import merge_lora
from topd_jax.sampling import rollout
from topd_jax.training.config import OptimizerSettings, Settings
from topd_jax.training.sft import annotate_packed, packed_metrics
from topd_jax.training.step import TrainState, annotate, update
from topd_jax.training.teachers import Teachers, shared_rows
from topd_jax.types import Annotations, Head, Trajectories


class Phases(NamedTuple):
    """The jitted parts of a step.

    Attributes:
      rollout: (student, teacher, prompts, key, first_row=0) -> trajectories;
        packed rows of written solutions, in the place of prompts, stay as
        they are, and the other parts take them in the place of trajectories.
      annotate: (student, teacher, trajectories, key, first_row=0,
        student_states=None) -> annotations; of several teachers, name ->
        annotations of its own rows.
      update: (state, teacher_head, trajectories, annotations, frozen) ->
        (state, metrics); donates the state.
      statistics: (student, teacher, trajectories) -> metrics.
    """

    rollout: Callable[..., Trajectories]
    annotate: Callable[..., Annotations | dict[str, Annotations]]
    update: Callable[..., tuple[TrainState, dict]]
    statistics: Callable[..., dict]


def make_optimizer(
    settings: OptimizerSettings, steps: int | None
) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up and cosine decay (App. B).

    Args:
      settings: rates and betas.
      steps: length of the run; None keeps the rate where it is.

    Returns:
      The transformation.
    """
    schedule = optax.constant_schedule(settings.learning_rate)
    if steps is not None:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=settings.learning_rate,
            warmup_steps=max(round(settings.warmup_fraction * steps), 1),
            decay_steps=max(steps, 2),
            end_value=settings.end_learning_rate,
        )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule,
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )


def make_phases(
    settings: Settings,
    optimizer: optax.GradientTransformation,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Phases:
    """The jitted phases of a run.

    Args:
      settings: of the run.
      optimizer: of the student.
      eos_ids: end-of-sequence ids.
      pad_id: id put where nothing is.

    Returns:
      Phases; each compiles at its first call, and lowers from shapes alone.
    """
    ids = dict(eos_ids=eos_ids, pad_id=pad_id)
    return Phases(
        jax.jit(_writer(settings, ids)),
        jax.jit(_reader(settings, ids)),
        jax.jit(_learner(settings, optimizer), donate_argnums=0),
        make_statistics(settings),
    )


def _writer(settings: Settings, ids: dict) -> Callable[..., Any]:
    options = settings.rollout
    offline = settings.offline if settings.objective.offline else None

    def write_as(
        model: Any,
        prompts: Any,
        key: jax.Array,
        shared: int,
        first_row: int | jax.Array = 0,
    ) -> Trajectories:
        return rollout(
            in_compute_dtype(merge_lora(model)),
            prompts,
            key,
            max_new_tokens=options.max_new_tokens,
            temperature=(offline or options).temperature,
            top_p=(offline or options).top_p,
            top_k=0 if offline else options.top_k,
            samples=settings.data.samples,
            vocab_size=shared,
            sharding=options.sharding,
            first_row=first_row,
            **ids,
        )

    def write(
        student: Any,
        teacher: Any,
        prompts: Any,
        key: jax.Array,
        first_row: int | jax.Array = 0,
    ) -> Trajectories | PackedRows:
        if isinstance(prompts, PackedRows):
            return prompts
        shared = shared_rows(student, teacher)
        if not offline:
            return write_as(student, prompts, key, shared, first_row)
        if not isinstance(teacher, Teachers):
            return write_as(teacher, prompts, key, shared)
        write_own = functools.partial(write_as, shared=shared)
        parts = teacher.each(write_own, prompts, key)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts.values())

    return write


def _reader(settings: Settings, ids: dict) -> Callable[..., Any]:
    objective, slices = settings.objective, settings.optimizer.accumulate

    def read(
        student: Any,
        teacher: Any,
        rows: Any,
        key: jax.Array,
        first_row: int | jax.Array = 0,
        student_states: jax.Array | None = None,
    ) -> Annotations | dict[str, Annotations]:
        if isinstance(rows, PackedRows):
            return annotate_packed(
                student, teacher, rows, objective=objective, slices=slices
            )

        def by(model: Any, own: tuple, key: jax.Array) -> Annotations:
            rows, states = own
            return annotate(
                student, model, rows, key, objective=objective,
                first_row=first_row, student_states=states, **ids,
            )  # fmt: skip

        if isinstance(teacher, Teachers):
            return teacher.each(by, (rows, student_states), key)
        return by(teacher, (rows, student_states), key)

    return read


def _learner(
    settings: Settings, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict]]:
    def learn(
        state: TrainState, teacher_head: Head, rows: Any, *notes: Any
    ) -> tuple[TrainState, dict]:
        state, metrics = update(
            state,
            teacher_head,
            rows,
            *notes,
            objective=settings.objective,
            optimizer=optimizer,
            accumulate=settings.optimizer.accumulate,
        )
        if isinstance(rows, PackedRows):
            metrics = packed_metrics(rows, metrics)
        return state, metrics

    return learn
