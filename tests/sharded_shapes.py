"""The step of one device on every mesh of eight; run by test_sharded.

A mixture of experts teaches another, so that every axis has parameters to
spread: 35 meshes, of all ways to write 8 as a product of the five axes.
"""

import itertools
import math

import jax
import optax
from conftest import EOS, PAD, VOCAB, make_trajectories
from sharded_step import assert_same, place

from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding
from topd_jax.training.step import annotate, init_state, update

CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    layers=2,
    width=16,
    heads=8,
    kv_heads=8,
    head_dim=4,
    mlp_width=16,
    experts=8,
    experts_per_token=2,
    expert_width=16,
)
MESHES = [
    shape
    for shape in itertools.product((1, 2, 4, 8), repeat=5)
    if math.prod(shape) == 8
]
OBJECTIVE = Objective(candidates=3, window=4, context="teacher")


def run(mesh, config=CONFIG, prompt=6, completion=10):
    make = jax.jit(init_decoder, static_argnums=0)
    student, teacher = (make(config, jax.random.key(i)) for i in (0, 1))
    optimizer = optax.sgd(1.0)
    rows = make_trajectories(rows=8, prompt=prompt, completion=completion)
    rows = jax.device_put(rows, sharding.batch_shardings(rows, mesh))

    @jax.jit
    def step(student, teacher, rows):
        notes = annotate(
            student, teacher, rows, jax.random.key(0), objective=OBJECTIVE,
            eos_ids=(EOS,), pad_id=PAD,
        )  # fmt: skip
        state = init_state(student, optimizer)
        state, metrics = update(
            state, teacher.head, rows, notes, objective=OBJECTIVE,
            optimizer=optimizer,
        )  # fmt: skip
        return state.student, metrics, notes.teacher_windows

    with jax.set_mesh(mesh):
        models = place(student, mesh), place(teacher, mesh)
        return jax.device_get(step(*models, rows))


def main() -> None:
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected = run(one)
    for shape in MESHES:
        assert_same(expected, run(sharding.make_mesh(*shape)))
        print(f"same on {shape}", flush=True)


if __name__ == "__main__":
    main()
