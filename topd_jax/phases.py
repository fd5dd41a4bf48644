"""The jitted parts of a step, and the optimizer, as the settings ask for them.

Each part lowers and compiles from shapes alone, on any device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topd_jax.distill import TrainState, annotate, update
from topd_jax.evaluate import make_statistics
from topd_jax.models.decoder import cast
from topd_jax.sampling import rollout
from topd_jax.settings import OptimizerSettings, Settings
from topd_jax.teachers import Teachers
from topd_jax.types import Annotations, Trajectories


class Phases(NamedTuple):
    """The jitted parts of a step.

    Attributes:
      rollout: (student, teacher, prompts, key) -> trajectories.
      annotate: (student, teacher, trajectories, key) -> annotations; of
        several teachers, name -> annotations of its own rows.
      update: (state, teacher_head, trajectories, annotations) -> (state,
        metrics); donates the state.
      statistics: (student, teacher, trajectories) -> metrics.
    """

    rollout: Callable[..., Trajectories]
    annotate: Callable[..., Annotations | dict[str, Annotations]]
    update: Callable[..., tuple[TrainState, dict]]
    statistics: Callable[..., dict]


def make_optimizer(
    settings: OptimizerSettings, steps: int
) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up and cosine decay (App. B).

    Args:
      settings: rates and betas.
      steps: length of the run.

    Returns:
      The transformation.
    """
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
    objective, writer = settings.objective, settings.rollout
    ids = dict(eos_ids=eos_ids, pad_id=pad_id)
    offline = settings.offline if objective.offline else None

    def write_as(model: Any, prompts: Any, key: jax.Array) -> Trajectories:
        return rollout(
            cast(model, model.config.dtype),
            prompts,
            key,
            max_new_tokens=writer.max_new_tokens,
            temperature=(offline or writer).temperature,
            top_p=(offline or writer).top_p,
            top_k=0 if offline else writer.top_k,
            samples=settings.data.samples,
            **ids,
        )

    def write(
        student: Any, teacher: Any, prompts: Any, key: jax.Array
    ) -> Trajectories:
        if not offline:
            return write_as(student, prompts, key)
        if not isinstance(teacher, Teachers):
            return write_as(teacher, prompts, key)
        parts = teacher.each(write_as, prompts, key)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts.values())

    def read(
        student: Any, teacher: Any, trajectories: Trajectories, key: jax.Array
    ) -> Annotations | dict[str, Annotations]:
        def by(model: Any, rows: Trajectories, key: jax.Array) -> Annotations:
            return annotate(
                student, model, rows, key, objective=objective, **ids
            )

        if isinstance(teacher, Teachers):
            return teacher.each(by, trajectories, key)
        return by(teacher, trajectories, key)

    def learn(*args: Any) -> tuple[TrainState, dict]:
        return update(
            *args,
            objective=objective,
            optimizer=optimizer,
            accumulate=settings.optimizer.accumulate,
        )

    return Phases(
        jax.jit(write),
        jax.jit(read),
        jax.jit(learn, donate_argnums=0),
        make_statistics(settings),
    )
