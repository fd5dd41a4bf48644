"""The jitted stages of a step, with a run's settings bound.

Each compiles at its first call, and lowers from shapes alone, on any device.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from topd_jax.data.packing import PackedRows, rows_of
from topd_jax.data.teachers import (
    by_name,
    shared_vocab,
    split_rows,
    total_metrics,
)
from topd_jax.evaluation.evaluator import compare, write
from topd_jax.evaluation.metrics import statistics as compare_tokens
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.compilation import decoding_options, jitted
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.sharding import spec_on, tree_shardings
from topd_jax.training.config import OptimizerSettings, Settings
from topd_jax.training.score import score
from topd_jax.training.sft import read_rows, row_states, sft_step
from topd_jax.training.step import (
    Metrics,
    TrainState,
    init_state,
    train_step,
)
from topd_jax.types import Scored, Teacher, Trajectories


class Compiled(NamedTuple):
    """The jitted stages of a step.

    In stage 1 rows of solutions take the place of trajectories.

    Attributes:
      rollout: (student, teachers, prompts, key) -> trajectories.
      score: (student, teachers, trajectories, key) -> what each teacher says.
      train_step: (state, trajectories, scored, frozen) -> (state, metrics);
        donates the state.
      statistics: (student, teachers, trajectories) -> metrics.
    """

    rollout: Callable[..., Trajectories]
    score: Callable[..., tuple[Scored, ...]]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    statistics: Callable[..., Metrics]


def make_schedule(
    settings: OptimizerSettings, steps: int | None
) -> optax.Schedule:
    """Make the learning rate: linear warm-up, then cosine decay (App. B).

    Args:
      settings: rates and warm-up.
      steps: length of the run; None keeps the rate where it is.

    Returns:
      updates made so far -> rate of the next one.
    """
    if steps is None:
        return optax.constant_schedule(settings.learning_rate)
    whole = max(steps, 2)
    share = settings.warmup_fraction
    warmup = max(round(share * steps), 1) if share else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=min(warmup, whole - 1),  # optax wants some decay
        decay_steps=whole,
        end_value=settings.end_learning_rate,
    )


@functools.lru_cache
def make_optimizer(
    settings: OptimizerSettings, steps: int | None
) -> optax.GradientTransformation:
    """Make AdamW with clipping and :func:`make_schedule` (App. B).

    Args:
      settings: rates and betas.
      steps: length of the run; None keeps the rate where it is.

    Returns:
      The transformation.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            make_schedule(settings, steps),
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )


def initial_state(
    student: Any, optimizer: optax.GradientTransformation, mesh: Any
) -> TrainState:
    """Make the train state at step 0, spread over the mesh as its parameters.

    Args:
      student: it is copied, or of one with adapters these alone.
      optimizer: of the student.
      mesh: of devices.

    Returns:
      The state.
    """

    def make(student: Any) -> TrainState:
        return init_state(student, optimizer)

    shapes = jax.eval_shape(make, student)
    shardings = tree_shardings(shapes, mesh, student.logical_axes)
    return jax.jit(make, out_shardings=shardings)(student)


@jax.jit
def step_keys(key: jax.Array, step: int) -> tuple[jax.Array, ...]:
    """Return the keys of a step's rollout and score, of the run's key."""
    return tuple(jax.random.split(jax.random.fold_in(key, step)))


def compile_step(
    settings: Settings,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    mesh: Mesh | None = None,
    shardings: Any = None,
    teachers: Sequence[Teacher] = (),
    shared: bool = False,
) -> Compiled:
    """Bind a run's settings to the stages of its step, and jit them.

    Args:
      settings: of the run.
      objective: of the run; unused in stage 1.
      optimizer: of the student.
      eos_ids: end-of-sequence ids.
      pad_id: id put where no token is.
      mesh: of the run; None takes the one in use now.
      shardings: of the train state, which a step then keeps; None lets XLA
        choose others, for which the second step compiles again.
      teachers: of the run, where rows and scores shall be spread over the
        mesh as is known before they compile; () lets XLA choose.
      shared: whether equal stages of another run may be returned; see
        :func:`~topd_jax.parallel.compilation.jitted`.

    Returns:
      The stages.
    """
    ids = dict(eos_ids=eos_ids, pad_id=pad_id)
    update = dict(optimizer=optimizer, accumulate=settings.optimizer.accumulate)
    layout = loss_layout(mesh, chunk_size=settings.train.chunk_size)
    look = dict(top_k=settings.log.top_k, layout=layout)
    drawn = ids | dict(samples=settings.data.samples)
    if settings.is_offline:
        stages = (
            functools.partial(_write_rows, options=settings.writing, **drawn),
            functools.partial(
                read_rows, layout=layout, slices=update["accumulate"]
            ),
            functools.partial(
                sft_step, layout=layout, kd_ratio=settings.offline.kd_ratio,
                **update,
            ),
            functools.partial(_compare_rows, **look),
        )  # fmt: skip
    else:
        stages = (
            functools.partial(_write, options=settings.rollout, **drawn),
            functools.partial(
                score, layout=layout, objective=objective,
                branch_sharding=settings.rollout.branch_sharding, **ids,
            ),
            functools.partial(
                train_step, layout=layout, objective=objective, **update
            ),
            functools.partial(_compare, **look),
        )  # fmt: skip
    rollout, read, step, statistics = stages
    rows, scored = _row_shardings(mesh, teachers)
    told = decoding_options(mesh, settings.rollout.sharding)
    jit = functools.partial(jitted, shared=shared)
    return Compiled(
        jit(rollout, out_shardings=rows, compiler_options=told),
        jit(read, out_shardings=scored),
        jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        jit(statistics),
    )


def compile_phases(
    settings: Settings, objective: Objective, *args: Any, **options: Any
) -> tuple[tuple[int, Compiled], ...]:
    """Call :func:`compile_step` for each phase of a run.

    Args:
      settings: of the run.
      objective: of the run; unused in stage 1.
      *args: of compile_step.
      **options: of compile_step.

    Returns:
      The stages of each phase, with its last step. Rollout and statistics are
      one program.
    """
    (last, first), *others = objective.phases(settings.train.steps)
    stages = compile_step(settings, first, *args, **options)
    if settings.is_offline:
        return ((settings.train.steps, stages),)
    phases = [(last, stages)]
    for end, later in others:
        score, step = compile_step(settings, later, *args, **options)[1:3]
        phases.append((end, stages._replace(score=score, train_step=step)))
    return tuple(phases)


def phase_of(phases: Sequence[tuple[int, Any]], step: int) -> Any:
    """Return what belongs to a step, of phases with their last steps."""
    return next(what for last, what in phases if step <= last)


def _row_shardings(
    mesh: Mesh | None, teachers: Sequence[Teacher]
) -> tuple[Any, Any]:
    """Return the shardings of rows and of scores: heads as XLA has them."""
    if mesh is None or not teachers:
        return None, None
    rows = NamedSharding(mesh, spec_on(mesh, ("batch",)))
    heads = [rows] * len(teachers)  # on one device all are the same
    if mesh.size > 1:
        heads = jax.jit(lambda models: [m and m.head for m in models])
        heads = heads.lower([t.model for t in teachers]).compile()
        heads = heads.output_shardings
    every = {field.name: rows for field in dataclasses.fields(Scored)}
    return rows, tuple(
        Scored(**every | {"teacher_head": head, "teacher": teacher.name})
        for teacher, head in zip(teachers, heads, strict=True)
    )


def _write(
    student: Any,
    teachers: Sequence[Teacher],
    prompts: Any,
    key: jax.Array,
    **options: Any,
) -> Trajectories:
    vocab_size = shared_vocab(student, teachers)
    return write(student, prompts, key, vocab_size=vocab_size, **options)


def _compare(
    student: Any,
    teachers: Sequence[Teacher],
    trajectories: Trajectories,
    **options: Any,
) -> Metrics:
    parts = [
        compare(student, teacher.beside(student), rows, **options)
        for teacher, rows in zip(
            teachers, split_rows(trajectories, teachers), strict=True
        )
    ]
    names = [t.name for t in teachers]
    return total_metrics(parts) | by_name(dict(zip(names, parts, strict=True)))


def _write_rows(
    student: Any,
    teachers: Sequence[Teacher],
    prompts: Any,
    key: jax.Array,
    **options: Any,
) -> PackedRows:
    """Let every teacher write solutions of its own prompts."""
    if isinstance(prompts, PackedRows):
        return prompts  # written beforehand
    vocab_size, parts = shared_vocab(student, teachers), []
    for i, (teacher, own) in enumerate(
        zip(teachers, split_rows(prompts, teachers), strict=True)
    ):
        own_key = jax.random.fold_in(key, i) if len(teachers) > 1 else key
        parts.append(
            write(teacher.model, own, own_key, vocab_size=vocab_size, **options)
        )
    return rows_of(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))


def _compare_rows(
    student: Any,
    teachers: Sequence[Teacher],
    rows: PackedRows,
    **options: Any,
) -> Metrics:
    parts = [
        compare_tokens(
            row_states(student, own), student.head,
            row_states(teacher.model, own), teacher.model.head,
            own.tokens, own.mask, **options,
        )
        for teacher, own in zip(
            teachers, split_rows(rows, teachers), strict=True
        )
    ]  # fmt: skip
    return total_metrics(parts)
