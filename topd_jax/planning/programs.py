"""Every program of a run, as shapes on a mesh: nothing is allocated.

The jitted phases that ``train`` calls, with the arguments it calls them with,
as ``jax.ShapeDtypeStruct`` with a sharding. They lower and compile for any
devices, also those of a topology that nobody owns. Ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from topd_jax.data.routing import shares_of
from topd_jax.data.toy_world.models import student_config, teacher_config
from topd_jax.evaluation.evaluator import make_writer
from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import init_decoder
from topd_jax.models.io.shapes import shape_of
from topd_jax.models.lora import split
from topd_jax.models.quantization import quantize
from topd_jax.parallel import apart, sharding
from topd_jax.parallel.teacher_mesh import rows_shardings
from topd_jax.training.config import ModelSettings, Settings
from topd_jax.training.phases import Phases, make_optimizer, make_phases
from topd_jax.training.step import init_state
from topd_jax.training.teachers import Teachers
from topd_jax.types import Prompts

# In which programs are told of.
ORDER = (
    "rollout", "student", "annotate", "join", "update", "read", "statistics",
    "evaluate", "restore",
)  # fmt: skip


class Call(NamedTuple):
    """A program and what it is called with.

    Attributes:
      fn: jitted.
      args: trees of ``ShapeDtypeStruct``.
      mesh: that it runs on.
      beside: trees that are alive meanwhile, its arguments among them, but
        for the models, the state and what other programs of its mesh make.
    """

    fn: Callable[..., Any]
    args: tuple
    mesh: Mesh
    beside: Any = ()


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of a run, as shapes on the mesh.

    Attributes:
      student: decoder of ``ShapeDtypeStruct``.
      frozen: what of it is not trained; None where all is.
      teacher: the same, or several as ``Teachers``.
      state: train state around the student.
      head: the teacher's output head, or teacher -> its head.
    """

    student: Any
    frozen: Any
    teacher: Any
    state: Any
    head: Any


def decoder_configs(
    settings: Settings,
) -> tuple[DecoderConfig, list[tuple[int, DecoderConfig]]]:
    """Student's and teachers' shapes, as the run would load them.

    Args:
      settings: of the run.

    Returns:
      (student, one (prompts in a batch, shape) a teacher).

    Raises:
      ValueError: for a model whose shape is not known here.
    """

    def one(model: ModelSettings, world: DecoderConfig) -> DecoderConfig:
        options = dict(
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            remat=model.remat,
            unroll=model.unroll,
        )
        if model.source == "world":
            config = dataclasses.replace(world, **options)
        else:
            config = shape_of(model.source, **options)
        config = config.keep_layers(model.keep_layers or range(config.layers))
        config = config.replace(attention=model.attention)
        if not model.lora_rank:
            return config
        lora = Lora(
            model.lora_rank,
            model.lora_alpha,
            model.lora_targets or config.lora_targets,
            model.lora_rank_stabilised,
        )
        return config.replace(lora=lora)

    world = teacher_config(settings.world)
    return one(settings.student, student_config(settings.world)), [
        (prompts, one(model, world))
        for prompts, model in _teachers(settings).values()
    ]


def _teachers(settings: Settings) -> dict[str, tuple[int, ModelSettings]]:
    """Teacher -> (prompts in a batch, model); "" is the only one's name."""
    size, several = settings.data.batch_size, settings.teachers
    if not several:
        return {"": (size, settings.teacher)}
    # Without prompts to count, as many for each.
    even = dict.fromkeys(several, 1)
    shares = settings.data.teacher_prompts or shares_of(even, size).values()
    return {
        name: (prompts, several[name])
        for name, prompts in zip(several, shares, strict=True)
    }


def abstract_models(
    settings: Settings, mesh: Mesh, theirs: Mesh | None = None
) -> Models:
    """The models of a run as shapes, spread as the run would spread them.

    Args:
      settings: of the run.
      mesh: over any devices.
      theirs: the teacher's own, where it has one; its head is on both.

    Returns:
      The models.

    Raises:
      ValueError: for a parameter that does not divide over the mesh.
    """
    ours, others = decoder_configs(settings)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    student = _decoder(ours, mesh, settings.student)
    axes = student.logical_axes
    frozen = jax.eval_shape(lambda s: split(s)[1], student)
    frozen = _placed(frozen, sharding.tree_shardings(frozen, mesh, axes))
    models = {
        name: _decoder(config, theirs or mesh, model)
        for (name, (_, model)), (_, config) in zip(
            _teachers(settings).items(), others, strict=True
        )
    }
    heads = {name: _head(model) for name, model in models.items()}
    if theirs is not None:
        heads = _placed(heads, rows_shardings(heads, mesh))
    teacher, head = models.get(""), heads.get("")
    if settings.teachers:
        prompts = tuple(prompts for prompts, _ in others)
        teacher, head = Teachers(models, prompts), heads
    state = jax.eval_shape(lambda s: init_state(s, optimizer), student)
    state = _placed(state, sharding.tree_shardings(state, mesh, axes))
    return Models(student, frozen, teacher, state, head)


def _head(model: Any) -> Any:
    """The output head, where its rows are."""
    rows = model.embedding if model.config.tied else model.output
    (place,) = (x.sharding for x in jax.tree.leaves(rows))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda m: m.head, model),
    )


def _decoder(config: DecoderConfig, mesh: Mesh, model: ModelSettings) -> Any:
    def make() -> Any:
        made = init_decoder(config, jax.random.key(0))
        if model.quantize:
            made = quantize(made, model.quantize, model.quantize_tile)
        return made

    shapes = jax.eval_shape(make)
    return _placed(
        shapes, sharding.tree_shardings(shapes, mesh, shapes.logical_axes)
    )


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def _rows(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, sharding.batch_shardings(tree, mesh))


def calls(
    settings: Settings,
    mesh: Mesh,
    theirs: Mesh | None = None,
    *,
    eos_ids: tuple[int, ...] = (1,),
) -> dict[str, Call]:
    """The programs of a run with what they are called with, in order.

    Args:
      settings: of the run.
      mesh: set as the mesh in use.
      theirs: the teacher's own, where it has one.
      eos_ids: that end a row; which they are changes no shape.

    Returns:
      "rollout", "annotate", "update", "statistics", "evaluate" (the sampler
      of evaluations) and "restore" (a fresh state, into whose shardings a
      checkpoint is read) -> call. With two meshes also "read", the teacher's
      part of the statistics, with parts of a batch "join", and "student", what
      the student reads for the teacher's mesh, where it is asked.

    Raises:
      ValueError: where something does not divide over the mesh.
    """
    if settings.objective.offline and settings.offline.pack_length:
        raise ValueError(
            f"offline.pack_length={settings.offline.pack_length}: packed rows "
            "are not planned; 0 plans the step in which the teacher writes"
        )
    models = abstract_models(settings, mesh, theirs)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    ids = dict(eos_ids=eos_ids, pad_id=0)
    phases = make_phases(settings, optimizer, **ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    student, teacher = models.student, models.teacher
    if theirs is not None:
        first, written, notes = _apart(settings, models, phases, mesh, theirs)
    else:
        run = (student, teacher, _prompts(settings, mesh), key)
        written = _rows(jax.eval_shape(phases.rollout, *run), mesh)
        told = (student, teacher, written, key)
        notes = _rows(jax.eval_shape(phases.annotate, *told), mesh)
        both = (student, teacher, written)
        first = {
            "rollout": Call(phases.rollout, run, mesh),
            "annotate": Call(phases.annotate, told, mesh),
            "statistics": Call(phases.statistics, both, mesh),
        }
    asked = _prompts(settings, mesh, settings.eval.batch_size)
    heat = jax.ShapeDtypeStruct((), jnp.float32)
    places = jax.tree.map(lambda x: x.sharding, models.state)
    ours, others = decoder_configs(settings)
    shared = min(c.vocab_size for c in (ours, *(c for _, c in others)))
    fresh = jax.jit(lambda s: init_state(s, optimizer), out_shardings=places)
    learnt = (models.state, models.head, written, notes, models.frozen)
    writer = make_writer(settings, vocab_size=shared, **ids)
    found = first | {
        "update": Call(phases.update, learnt, mesh),
        "evaluate": Call(writer, (student, asked, key, heat), mesh),
        "restore": Call(fresh, (models.student,), mesh),
    }
    return {name: found[name] for name in ORDER if name in found}


def _apart(
    settings: Settings, models: Models, phases: Phases, mesh: Mesh, theirs: Mesh
) -> tuple[dict[str, Call], Any, Any]:
    """What :mod:`topd_jax.parallel.apart` calls; the whole batch, and its
    notes."""
    parts, objective = settings.teacher_mesh.parts, settings.objective
    key = jax.eval_shape(lambda: jax.random.key(0))
    row = jax.ShapeDtypeStruct((), jnp.int32)
    student, teacher = models.student, models.teacher
    prompts = _prompts(settings, mesh, settings.data.batch_size // parts)
    writer = jax.eval_shape(apart.counted, teacher)
    run = (student, writer, prompts, key, row)
    part = _rows(jax.eval_shape(phases.rollout, *run), mesh)
    need = functools.partial(apart.needed_of, objective=objective)
    ours = jax.eval_shape(need, student)
    ours = _placed(ours, rows_shardings(ours, theirs))
    reader, states, moved = apart.make_reader(), None, _rows(part, theirs)
    if objective.needs_student_states:
        states = _rows(jax.eval_shape(reader, student, part), theirs)
    told = (ours, teacher, moved, key, row, states)
    with jax.set_mesh(theirs):
        there = _rows(jax.eval_shape(phases.annotate, *told), theirs)
    join = apart.make_join(objective)
    slices = ([part] * parts, [_rows(there, mesh)] * parts, key)
    written, notes = part, slices[1][0]
    if parts > 1:
        written, notes = _rows(jax.eval_shape(join, *slices), mesh)
    seen = (teacher, _rows(written, theirs))
    with jax.set_mesh(theirs):
        found = jax.eval_shape(reader, *seen)
    compared = (student, models.head, _rows(found, mesh), written)
    out = {
        "rollout": Call(phases.rollout, run, mesh, [part] * (parts - 1)),
        # Notes of the other parts wait until all have been dispatched.
        "annotate": Call(
            phases.annotate,
            told,
            theirs,
            (ours, moved, states, [there] * (parts - 1)),
        ),
        "read": Call(reader, seen, theirs, seen[1]),
        "statistics": Call(apart.make_comparison(settings), compared, mesh),
    }
    if states is not None:
        out["student"] = Call(reader, (student, part), mesh)
    if parts > 1:
        out["join"] = Call(join, slices, mesh, slices)
    return out, written, notes


def _prompts(
    settings: Settings, mesh: Mesh, rows: int | None = None
) -> Prompts:
    shape = (
        rows or settings.data.batch_size, settings.data.max_prompt_length
    )  # fmt: skip
    return _rows(
        Prompts(
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, bool),
        ),
        mesh,
    )


def bytes_held(tree: Any, mesh: Mesh | None = None) -> float:
    """Bytes of one device's part of a tree of placed shapes.

    Args:
      tree: of ``ShapeDtypeStruct``.
      mesh: count what is on this one; None counts everything.
    """
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape, place = leaf.shape, getattr(leaf, "sharding", None)
        if place is not None:
            if mesh is not None and place.mesh != mesh:
                continue
            shape = place.shard_shape(shape)
        # NumPy has no type of four bits; a key is of 8 bytes.
        small = str(leaf.dtype) in ("int4", "uint4")
        size = 0.5 if small else getattr(leaf.dtype, "itemsize", 8)
        total += math.prod(shape) * size
    return total


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology, which need not exist.

    Args:
      name: kind and shape, "v5e:2x4".

    Returns:
      Devices to compile for.

    Raises:
      ValueError: where libtpu is missing or does not know the name.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            topology_name=name, platform="tpu"
        ).devices
    except Exception as error:  # the plugin's own types
        raise ValueError(
            f"--topology {name}: {' '.join(str(error).split())[:300]}; try "
            "v5e:2x4, and pip install 'topd_jax[tpu]' where libtpu is missing"
        ) from error
