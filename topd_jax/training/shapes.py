"""The models of a run as shapes on a mesh; nothing is allocated.

``jax.ShapeDtypeStruct`` with a sharding in the place of every array, from
config files alone. Programs lower and compile for them on any devices.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from topd_jax.data.routing import shares_of
from topd_jax.data.templates import teacher_width
from topd_jax.data.toy_world.models import world_config
from topd_jax.models.adapters import lora_of
from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import init_decoder
from topd_jax.models.io.loading import shape_of
from topd_jax.models.lora import split
from topd_jax.models.quantization import quantize
from topd_jax.models.settings import ModelSettings
from topd_jax.parallel import sharding
from topd_jax.training.compiled import make_optimizer
from topd_jax.training.config import Settings
from topd_jax.training.step import init_state
from topd_jax.types import Teacher


class Models(NamedTuple):
    """Hold the models of a run as shapes on the mesh.

    Attributes:
      student: decoder of ``ShapeDtypeStruct``.
      teachers: the same for each teacher, None for the student itself.
      frozen: what of the student is not trained; None if all is.
      state: train state around the student.
    """

    student: Any
    teachers: tuple[Teacher, ...]
    frozen: Any
    state: Any


def abstract_models(settings: Settings, mesh: Mesh) -> Models:
    """Return the models of a run as shapes, sharded as the run shards them.

    Args:
      settings: of the run.
      mesh: over any devices.

    Raises:
      ValueError: for a model whose shape is not known, or a parameter that
        does not divide over the mesh.
    """
    configs = model_configs(settings)
    models = {
        name: _decoder(configs[name], model, mesh)
        for name, model in model_settings(settings).items()
    }
    student = models["student"]
    teachers = tuple(
        Teacher(models.get(section_of(name)), name, count)
        for name, count in teacher_prompts(settings).items()
    )
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    frozen = jax.eval_shape(lambda s: split(s)[1], student)
    state = jax.eval_shape(lambda s: init_state(s, optimizer), student)
    frozen, state = (
        placed(tree, sharding.tree_shardings(tree, mesh, student.logical_axes))
        for tree in (frozen, state)
    )
    return Models(student, teachers, frozen, state)


def teacher_prompts(settings: Settings) -> dict[str, int]:
    """Return name of a teacher -> prompts of a batch; "" names the only one.

    Without prompts to count, as many for each.

    Args:
      settings: of the run.
    """
    size, names = settings.data.batch_size, settings.teachers or ("",)
    if given := settings.data.prompts_per_teacher:
        return dict(zip(names, given, strict=True))
    return shares_of(dict.fromkeys(names, 1), size)


def model_configs(settings: Settings) -> dict[str, DecoderConfig]:
    """Return the shape of every model, as the settings have it computed.

    Adapters that are read from a directory count as if of rank 1: only the
    directory knows theirs.

    Args:
      settings: of the run.

    Returns:
      "student", then every loaded teacher's section of the config -> its
      shape.

    Raises:
      ValueError: for a model whose shape is not known.
    """
    configs = {}
    for name, model in model_settings(settings).items():
        student = name == "student"
        if model.in_world:
            config = world_config(settings.world, model.world_part(name))
        else:
            config = shape_of(model.source)
        config = config.keep_layers(model.keep_layers or range(config.layers))
        options = ("dtype", "param_dtype", "remat", "unroll", "attention")
        config = config.replace(**{key: getattr(model, key) for key in options})
        config = config.for_rows(row_length(settings))
        apart = student or model.quantize  # else they are merged
        if model.lora_rank or (model.adapter and apart):
            config = config.replace(lora=lora_of(model, config))
        configs[name] = config
    return configs


def row_length(settings: Settings) -> int:
    """Return the tokens of the longest row of a run: prompt and completion.

    Args:
      settings: of the run.
    """
    prompt = max(settings.data.max_prompt_length, teacher_width(settings.data))
    return prompt + settings.rollout.max_new_tokens


def _decoder(config: DecoderConfig, model: ModelSettings, mesh: Mesh) -> Any:
    def init() -> Any:
        return quantize(init_decoder(config, jax.random.key(0)), model.quantize)

    shapes = jax.eval_shape(init)
    axes = shapes.logical_axes
    return placed(shapes, sharding.tree_shardings(shapes, mesh, axes))


def model_settings(settings: Settings) -> dict[str, ModelSettings]:
    """Return section of the config -> each model to load, the student first."""
    teachers = {
        section_of(name): model
        for name, model in settings.by_teacher.items()
        if not model.is_student
    }
    return {"student": settings.student} | teachers


def section_of(teacher: str) -> str:
    """Return the section of the config of a teacher; "": the only one."""
    return f"teachers.{teacher}" if teacher else "teacher"


def placed(shapes: Any, shardings: Any) -> Any:
    """Give shapes their shardings: two trees of one structure -> one."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


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
