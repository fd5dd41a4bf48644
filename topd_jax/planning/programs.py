"""Every program of a run as shapes on a mesh; nothing is allocated.

The jitted functions that the trainer calls, with the arguments it calls them
with, as ``jax.ShapeDtypeStruct`` with a sharding. They lower and compile for
any devices, also those of a topology that is not at hand. This is the only
module of planning that knows the trainer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from topd_jax.data.routing import shares_of
from topd_jax.data.toy_world.models import world_config
from topd_jax.evaluation.evaluator import write
from topd_jax.models.adapters import lora_of
from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import init_decoder
from topd_jax.models.io.loading import shape_of
from topd_jax.models.lora import split
from topd_jax.models.quantization import quantize
from topd_jax.models.settings import ModelSettings
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel import sharding
from topd_jax.training.compiled import compile_step, make_optimizer
from topd_jax.training.config import Settings
from topd_jax.training.setup import model_settings
from topd_jax.training.step import init_state
from topd_jax.types import Prompts, Scored, Teacher


class Call(NamedTuple):
    """Hold a program and what it is called with.

    Attributes:
      fn: jitted.
      args: trees of ``ShapeDtypeStruct``.
      live: trees of everything that is on the devices while it runs, its
        arguments among them.
    """

    fn: Callable[..., Any]
    args: tuple
    live: tuple


class Models(NamedTuple):
    """Hold the models of a run as shapes on the mesh.

    Attributes:
      student: decoder of ``ShapeDtypeStruct``.
      teachers: the same for each frozen teacher.
      frozen: what of the student is not trained; None if all is.
      state: train state around the student.
    """

    student: Any
    teachers: tuple[Teacher, ...]
    frozen: Any
    state: Any


def calls(settings: Settings, mesh: Mesh) -> dict[str, Call]:
    """Return the programs of a run with what they are called with.

    Args:
      settings: of the run.
      mesh: set as the mesh in use.

    Returns:
      "rollout", "score", "train_step", "statistics" and "evaluate" (the
      sampler of evaluations) -> call.

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
    models = abstract_models(settings, mesh)
    student, teachers = models.student, models.teachers
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    ids = dict(eos_ids=(1,), pad_id=0)  # which they are changes no shape
    objective = make_objective(settings.objective)
    shardings = jax.tree.map(lambda x: x.sharding, models.state)
    step = compile_step(
        settings, objective, optimizer, mesh=mesh, shardings=shardings, **ids
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = _prompts(settings, mesh, settings.data.batch_size)
    questions = _prompts(settings, mesh, settings.eval.batch_size)
    written = (student, teachers, prompts, key)
    rows = _rows(jax.eval_shape(step.rollout, *written), mesh)
    read = (student, teachers, rows, key)
    scored = tuple(
        _scored(part, teacher.model, mesh)
        for part, teacher in zip(
            jax.eval_shape(step.score, *read), teachers, strict=True
        )
    )
    learned = (models.state, rows, scored, models.frozen)
    shapes = [m.config for m in (student, *(t.model for t in teachers))]
    sampler = functools.partial(
        write,
        options=settings.rollout,
        vocab_size=min(shape.vocab_size for shape in shapes),
        **ids,
    )
    asked = (student, questions, key, jax.ShapeDtypeStruct((), jnp.float32))
    # Teachers and train state are always there.
    held = (models.state, teachers, models.frozen)
    during = (*held, prompts, rows)
    return {
        "rollout": Call(step.rollout, written, (*held, prompts)),
        "score": Call(step.score, read, during),
        "train_step": Call(step.train_step, learned, (*during, scored)),
        "statistics": Call(step.statistics, read[:3], (*during, scored)),
        "evaluate": Call(jax.jit(sampler), asked, (*held, questions)),
    }


def abstract_models(settings: Settings, mesh: Mesh) -> Models:
    """Return the models of a run as shapes, sharded as the run shards them.

    Args:
      settings: of the run.
      mesh: over any devices.

    Raises:
      ValueError: for a model whose shape is not known, or a parameter that
        does not divide over the mesh.
    """
    size, configs = settings.data.batch_size, model_configs(settings)
    student, *models = (
        _decoder(configs[name], model, mesh)
        for name, model in model_settings(settings).items()
    )
    # Without prompts to count, as many for each teacher.
    names, prompts = tuple(settings.teachers), settings.data.teacher_prompts
    if names and not prompts:
        prompts = shares_of(dict.fromkeys(names, 1), size).values()
    rows = zip(models, names or ("",), prompts or (size,), strict=True)
    teachers = tuple(Teacher(*row) for row in rows)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    frozen = jax.eval_shape(lambda s: split(s)[1], student)
    state = jax.eval_shape(lambda s: init_state(s, optimizer), student)
    frozen, state = (
        _placed(tree, sharding.tree_shardings(tree, mesh, student.logical_axes))
        for tree in (frozen, state)
    )
    return Models(student, teachers, frozen, state)


def model_configs(settings: Settings) -> dict[str, DecoderConfig]:
    """Return the shape of every model, as the settings have it computed.

    Adapters that are read from a directory count as if of rank 1: only the
    directory knows theirs.

    Args:
      settings: of the run.

    Returns:
      "student", then every teacher's section of the config -> its shape.

    Raises:
      ValueError: for a model whose shape is not known.
    """
    configs = {}
    for name, model in model_settings(settings).items():
        student = name == "student"
        if model.source == "world":
            size = "student" if student else "teacher"
            config = world_config(settings.world, size)
        else:
            config = shape_of(model.source)
        config = config.keep_layers(model.keep_layers or range(config.layers))
        options = ("dtype", "param_dtype", "remat", "unroll", "attention")
        config = config.replace(**{key: getattr(model, key) for key in options})
        if model.lora_rank or (model.adapter and student):
            config = config.replace(lora=lora_of(model, config))
        configs[name] = config
    return configs


def _decoder(config: DecoderConfig, model: ModelSettings, mesh: Mesh) -> Any:
    def init() -> Any:
        decoder = init_decoder(config, jax.random.key(0))
        if model.quantize:
            return quantize(decoder, model.quantize, model.quantize_tile)
        return decoder

    shapes = jax.eval_shape(init)
    axes = shapes.logical_axes
    return _placed(shapes, sharding.tree_shardings(shapes, mesh, axes))


def _scored(part: Any, model: Any, mesh: Mesh) -> Any:
    """Shard what a teacher says by rows, its head as its parameters."""
    if not isinstance(part, Scored):  # states of written solutions
        return _rows(part, mesh)
    parameter = model.embedding if model.config.tied else model.output
    (place,) = (x.sharding for x in jax.tree.leaves(parameter))
    head = _placed(
        part.teacher_head, jax.tree.map(lambda _: place, part.teacher_head)
    )
    rows = _rows(part.replace(teacher_head=None), mesh)
    return rows.replace(teacher_head=head)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def _rows(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, sharding.batch_shardings(tree, mesh))


def _prompts(settings: Settings, mesh: Mesh, rows: int) -> Prompts:
    shape = (rows, settings.data.max_prompt_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return _rows(Prompts(tokens, jax.ShapeDtypeStruct(shape, bool)), mesh)


def bytes_held(tree: Any) -> float:
    """Return the bytes of one device's part of a tree of sharded shapes.

    Args:
      tree: of ``ShapeDtypeStruct``.
    """
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape, place = leaf.shape, getattr(leaf, "sharding", None)
        if place is not None:
            shape = place.shard_shape(shape)
        # NumPy has no type of four bits.
        four_bits = str(leaf.dtype) in ("int4", "uint4")
        total += math.prod(shape) * (0.5 if four_bits else leaf.dtype.itemsize)
    return total
