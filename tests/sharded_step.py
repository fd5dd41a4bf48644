"""The real step on 8 simulated devices against one; run by test_sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import EOS, PAD, make_model, make_trajectories

from topd_jax.models import Lora, add_lora, merge_lora, parameter_table
from topd_jax.models.config import LORA_TARGETS
from topd_jax.models.lora import join, split
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding
from topd_jax.training.step import annotate, init_state, update
from topd_jax.training.teachers import Teachers

# Eight devices in every shape that the models' sizes allow.
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2))
# Where the teacher's parameters are while it looks ahead.
AHEAD = {
    (2, 4, 1): ("rows",), (2, 2, 2): ("gathered",),
    (1, 4, 2): ("rows", "gathered"),
}  # fmt: skip


def place(model, mesh):
    shards = sharding.tree_shardings(model, mesh, model.logical_axes)
    return jax.device_put(model, shards)


def run(mesh, objective, accumulate, lora=None):
    student, teacher = make_model(0), make_model(1, layers=3, width=24)
    optimizer = optax.sgd(1.0)
    trajectories = make_trajectories(rows=16)
    trajectories = jax.device_put(
        trajectories, sharding.batch_shardings(trajectories, mesh)
    )
    with jax.set_mesh(mesh):
        student, teacher = place(student, mesh), place(teacher, mesh)
        if lora is not None:
            student = add_lora(student, lora, factors(student, lora), mesh=mesh)
        read = jax.jit(
            functools.partial(
                annotate, objective=objective, eos_ids=(EOS,), pad_id=PAD
            )
        )
        notes = read(student, teacher, trajectories, jax.random.key(0))
        learn = jax.jit(
            functools.partial(
                update,
                objective=objective,
                optimizer=optimizer,
                accumulate=accumulate,
            )
        )
        state, metrics = learn(
            init_state(student, optimizer),
            teacher.head,
            trajectories,
            notes,
            split(student)[1],
        )
        if mesh.devices.size > 1:
            spread = {
                x.sharding.is_fully_replicated
                for x in jax.tree.leaves(state.student)
            }
            assert mesh.shape["fsdp"] * mesh.shape["tensor"] == 1 or (
                False in spread
            ), "no parameter is spread"
    merged = merge_lora(join(state.student, split(student)[1]))
    windows = notes.teacher_windows and notes.teacher_windows.tokens
    return jax.device_get(
        (state.student, merged, metrics, notes.distance, windows)
    )


def factors(model, lora):
    """Adapters whose B is not zero, so that A has a gradient."""
    table = parameter_table(dataclasses.replace(model.config, lora=lora))
    rng = np.random.default_rng(0)
    return {
        n: rng.normal(0, 0.2, table[n].shape) for n in table if "_lora_" in n
    }


def run_several(mesh):
    """Two teachers of another width each, with 8 of 24 rows and with 16."""
    optimizer, objective = optax.sgd(1.0), Objective(variant="opd")
    models = {"a": make_model(1, layers=1, width=24), "b": make_model(2)}
    trajectories = make_trajectories(rows=24)
    trajectories = jax.device_put(
        trajectories, sharding.batch_shardings(trajectories, mesh)
    )
    with jax.set_mesh(mesh):
        student = place(make_model(0), mesh)
        teachers = Teachers({n: place(m, mesh) for n, m in models.items()},
                            (1, 2))  # fmt: skip

        @jax.jit
        def step(state, teachers, trajectories):
            def read(model, rows, key):
                return annotate(
                    student, model, rows, key, objective=objective,
                    eos_ids=(EOS,), pad_id=PAD,
                )  # fmt: skip

            notes = teachers.each(read, trajectories, jax.random.key(0))
            return update(
                state, teachers.head, trajectories, notes,
                objective=objective, optimizer=optimizer,
            )  # fmt: skip

        state, metrics = step(
            init_state(student, optimizer), teachers, trajectories
        )
    return jax.device_get((state.student, metrics))


def assert_same(expected, found):
    for x, y in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(jnp.asarray(x), y, rtol=2e-4, atol=2e-5)


def look_ahead(one):
    """The same windows and step, wherever the teacher's parameters are."""
    objective = Objective(
        candidates=3, window=4, branch_loss="reverse_kl", branch_temperature=1.0
    )
    expected = run(one, objective, 1)
    for shape, names in AHEAD.items():
        for name in names:
            other = dataclasses.replace(objective, branch_sharding=name)
            found = run(sharding.make_mesh(*shape), other, 1)
            np.testing.assert_array_equal(expected[-1], found[-1])
            assert_same(expected, found)
            print(f"same on {shape}, {name}", flush=True)


def main() -> None:
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert_same(run_several(one), run_several(sharding.make_mesh(2, 2, 2)))
    print("same on (2, 2, 2), several teachers", flush=True)
    # sharded_shapes.py has the teacher's context on every mesh.
    for context, shapes in (("teacher", ()), ("student", MESHES)):
        objective = Objective(candidates=3, window=4, context=context)
        expected = run(one, objective, 1)
        for shape, slices in (*((s, 1) for s in shapes), ((2, 2, 2), 2)):
            mesh = sharding.make_mesh(*shape)
            assert_same(expected, run(mesh, objective, slices))
            print(f"same on {shape}, {context}, {slices}", flush=True)
    look_ahead(one)
    objective, lora = Objective(variant="opd"), Lora(4, 8.0, LORA_TARGETS)
    mesh = sharding.make_mesh(2, 2, 2)
    assert_same(run(one, objective, 1, lora), run(mesh, objective, 2, lora))
    print("same on (2, 2, 2), adapters", flush=True)


if __name__ == "__main__":
    main()
