"""Compiles the phases of a config for a TPU topology, from shapes alone."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from topd_jax.data.toy_world.models import student_config, teacher_config
from topd_jax.evaluation.evaluator import make_statistics
from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.parallel import sharding
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.training.step import init_state
from topd_jax.types import Prompts

SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    dtype="bfloat16",
)


def shapes_of(settings: Settings) -> tuple[DecoderConfig, DecoderConfig]:
    """Student's and teacher's shapes, as the config would load them."""
    if settings.student.source != "world":
        kept = len(settings.student.keep_layers)
        return dataclasses.replace(SMOLLM2, layers=kept), SMOLLM2
    return student_config(settings.world), teacher_config(settings.world)


def main(name: str, topology: str) -> None:
    config = importlib.import_module(f"topd_jax.configs.{name}").get_config()
    config.data.batch_size = 8
    settings = settings_from(config)
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    mesh = sharding.make_mesh(data=-1, fsdp=2, devices=devices)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    phases = make_phases(settings, optimizer, eos_ids=(2,), pad_id=0)

    def spread(make, axes):
        shapes = jax.eval_shape(make)
        shards = sharding.tree_shardings(shapes, mesh, axes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            shards,
        )

    def rows(tree):
        shards = sharding.batch_shardings(tree, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shards,
        )

    ours, theirs = shapes_of(settings)
    key = jax.eval_shape(lambda: jax.random.key(0))
    axes = jax.eval_shape(
        lambda: init_decoder(ours, jax.random.key(0))
    ).logical_axes
    state = spread(
        lambda: init_state(init_decoder(ours, jax.random.key(0)), optimizer),
        axes,
    )
    teacher = spread(lambda: init_decoder(theirs, jax.random.key(0)), axes)
    (head,) = jax.tree.leaves(teacher.embedding)  # tied: it is the head
    width = settings.data.max_prompt_length
    prompts = rows(
        Prompts(
            jax.ShapeDtypeStruct((8, width), jnp.int32),
            jax.ShapeDtypeStruct((8, width), bool),
        )
    )
    with jax.set_mesh(mesh):
        run = (state.student, teacher, prompts, key)
        trajectories = rows(jax.eval_shape(phases.rollout, *run))
        told = (state.student, teacher, trajectories, key)
        notes = jax.eval_shape(phases.annotate, *told)
        per_row = rows(notes)
        calls = {
            "rollout": (phases.rollout, run),
            "annotate": (phases.annotate, told),
            "update": (
                phases.update,
                (state, head, trajectories, per_row),
            ),
            "statistics": (
                make_statistics(settings),
                (state.student, teacher, trajectories),
            ),
        }
        for phase, (fn, args) in calls.items():
            compiled = fn.lower(*args).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            print(f"{phase} compiled, {size / 2**20:.1f} MB temporaries")


if __name__ == "__main__":
    main(*sys.argv[1:])
