"""Every program of a run as shapes on a mesh; nothing is allocated.

The jitted functions that the trainer calls, with the arguments it calls them
with, as ``jax.ShapeDtypeStruct`` with a sharding. They lower and compile for
any devices, also those of a topology that is not at hand. This is the only
module of planning that knows the trainer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from topd_jax.data.templates import teacher_width
from topd_jax.evaluation.evaluator import compare, write
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel import sharding
from topd_jax.parallel.compilation import decoding_options
from topd_jax.parallel.layouts import loss_layout
from topd_jax.training.compiled import (
    Compiled,
    compile_phases,
    make_optimizer,
)
from topd_jax.training.config import Settings
from topd_jax.training.shapes import (
    Models,
    abstract_models,
    bytes_held,
    placed,
)
from topd_jax.types import Prompts, Scored


class Call(NamedTuple):
    """Hold a program and what it is called with.

    Attributes:
      fn: jitted.
      args: trees of ``ShapeDtypeStruct``.
      live: trees of everything that is on the devices while it runs, its
        arguments among them.
      times: how often the program runs for what is planned: for a batch that
        is written in slots, one of full slots.
    """

    fn: Callable[..., Any]
    args: tuple
    live: tuple
    times: float = 1.0


def calls(settings: Settings, mesh: Mesh) -> dict[str, Call]:
    """Return the programs of a run with what they are called with.

    Args:
      settings: of the run.
      mesh: set as the mesh in use.

    Returns:
      "rollout", "score", "train_step", "statistics" unless they are off,
      "evaluate" (the sampler of evaluations) and "compare" (with the largest
      teacher) -> call; with "score 2" and "train_step 2" where guidance ends
      before the run.

    Raises:
      ValueError: if something does not divide over the mesh, or the run reads
        solutions that were written beforehand.
    """
    if settings.offline.path:
        raise ValueError(
            f"offline.path={settings.offline.path!r}: the rows of written "
            "solutions are not known; offline.path='' plans the step in which "
            "the teacher writes"
        )
    slots = settings.rollout.slots
    whole = dataclasses.replace(settings.rollout, slots=0)
    settings = dataclasses.replace(settings, rollout=whole)
    models = abstract_models(settings, mesh)
    student, teachers = models.student, models.teachers
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    ids = dict(eos_ids=(1,), pad_id=0)  # which they are changes no shape
    objective = make_objective(settings.objective)
    shardings = jax.tree.map(lambda x: x.sharding, models.state)
    phases = compile_phases(
        settings, objective, optimizer, mesh=mesh, shardings=shardings, **ids
    )
    step = phases[0][1]
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = _prompts(settings, mesh, settings.data.batch_size)
    questions = _prompts(settings, mesh, settings.eval.batch_size)
    written = (student, teachers, prompts, key)
    rows = _rows(jax.eval_shape(step.rollout, *written), mesh)
    shapes = [student.config, *(t.beside(student).config for t in teachers)]
    sampler = functools.partial(
        write,
        options=settings.rollout,
        vocab_size=min(shape.vocab_size for shape in shapes),
        **ids,
    )
    told = decoding_options(mesh, settings.rollout.sharding)
    writer = jax.jit(sampler, compiler_options=told)
    asked = (student, questions, key, jax.ShapeDtypeStruct((), jnp.float32))
    # Teachers and train state are always there.
    held = (models.state, teachers, models.frozen)
    during = (*held, prompts, rows)
    every = {"rollout": Call(step.rollout, written, (*held, prompts))}
    for (_, step), name in zip(phases, ("", " 2"), strict=False):
        score, train = _learning(step, models, rows, key, during, mesh)
        every |= {f"score{name}": score, f"train_step{name}": train}
    read = (student, teachers, rows)
    every |= {
        "statistics": Call(step.statistics, read, every["train_step"].live),
        "evaluate": Call(writer, asked, (*held, questions)),
        "compare": _comparison(settings, models, writer, asked, slots, mesh),
    }
    if slots:
        every |= _in_slots(every, settings, mesh, slots, sampler)
    if not settings.log.statistics_every:
        del every["statistics"]
    return every


def _learning(
    step: Compiled, models: Models, rows: Any, key: Any, during: tuple,
    mesh: Mesh,
) -> tuple[Call, Call]:  # fmt: skip
    """Return the calls of score and train_step."""
    student, teachers = models.student, models.teachers
    read = (student, teachers, rows, key)
    scored = tuple(
        _scored(part, teacher.beside(student), mesh)
        for part, teacher in zip(
            jax.eval_shape(step.score, *read), teachers, strict=True
        )
    )
    learned = (models.state, rows, scored, models.frozen)
    return (
        Call(step.score, read, during),
        Call(step.train_step, learned, (*during, scored)),
    )


def _comparison(
    settings: Settings, models: Models, writer: Callable[..., Any],
    asked: tuple, slots: int, mesh: Mesh,
) -> Call:  # fmt: skip
    """Return the call that compares what evaluations wrote, so many at once."""
    student, questions, *rest = asked
    count = settings.eval.batch_size
    size = min(slots or count, count)
    if size < count:
        questions = _prompts(settings, mesh, size)
    rows = _rows(jax.eval_shape(writer, student, questions, *rest), mesh)
    teacher = max(models.teachers, key=bytes_held).beside(student)
    layout = loss_layout(mesh, chunk_size=settings.train.chunk_size)
    return Call(
        jax.jit(
            functools.partial(compare, top_k=settings.log.top_k, layout=layout)
        ),
        (student, teacher, rows),
        (models.state, models.teachers, models.frozen, rows),
        count / size,
    )


def _in_slots(
    run: dict[str, Call],
    settings: Settings,
    mesh: Mesh,
    slots: int,
    sampler: Callable[..., Any],
) -> dict[str, Call]:
    """Return the programs that write rows in slots, as if all were full."""
    student, teachers, _, key = run["rollout"].args
    prompts = _prompts(settings, mesh, slots)
    rows = settings.data.batch_size * settings.data.samples
    writers = {
        "rollout": (student, settings.rollout, rows),
        "evaluate": (student, settings.rollout, settings.eval.batch_size),
    }
    if settings.is_offline:
        writers["rollout"] = teachers[0].model, settings.writing, rows
    return {
        name: Call(
            jax.jit(
                functools.partial(sampler, options=options),
                compiler_options=decoding_options(mesh, options.sharding),
            ),
            (model, prompts, key),
            run[name].live,
            rows / slots,
        )
        for name, (model, options, rows) in writers.items()
        if slots < rows
    }


def _scored(part: Any, model: Any, mesh: Mesh) -> Any:
    """Shard what a teacher says by rows, its head as its parameters."""
    if not isinstance(part, Scored):  # states of written solutions
        return _rows(part, mesh)
    parameter = model.embedding if model.config.tied else model.output
    (place,) = (x.sharding for x in jax.tree.leaves(parameter))
    head = placed(
        part.teacher_head, jax.tree.map(lambda _: place, part.teacher_head)
    )
    rows = _rows(part.replace(teacher_head=None), mesh)
    return rows.replace(teacher_head=head)


def _rows(tree: Any, mesh: Mesh) -> Any:
    return placed(tree, sharding.batch_shardings(tree, mesh))


def _prompts(settings: Settings, mesh: Mesh, rows: int) -> Prompts:
    def prompts(width: int) -> Prompts:
        tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
        return Prompts(tokens, jax.ShapeDtypeStruct((rows, width), bool))

    data, own = settings.data, None
    # A record's own needs no template.
    if any(settings.templates.values()) or data.max_teacher_prompt_length:
        own = prompts(teacher_width(data))
    return _rows(prompts(data.max_prompt_length).replace(teacher=own), mesh)
