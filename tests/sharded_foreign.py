"""A foreign student's step on 8 devices against one; run by test_foreign."""

import functools

import jax
import numpy as np
import optax
from conftest import EOS, PAD, make_model, make_trajectories
from foreign_model import make_foreign

from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding
from topd_jax.sampling import rollout
from topd_jax.training.step import annotate, init_state, update
from topd_jax.types import Prompts

AXES = {"words/embedding": ("vocab", "embed")}
OBJECTIVE = Objective(candidates=3, window=4, context="teacher")


def place(model, mesh):
    shards = sharding.tree_shardings(model, mesh, model.logical_axes)
    return jax.device_put(model, shards)


def run(mesh, axes):
    student, teacher = make_foreign(logical_axes=axes), make_model(1)
    optimizer = optax.sgd(1.0)
    trajectories = make_trajectories()
    trajectories = jax.device_put(
        trajectories, sharding.batch_shardings(trajectories, mesh)
    )
    ids = dict(eos_ids=(EOS,), pad_id=PAD)
    with jax.set_mesh(mesh):
        student, teacher = place(student, mesh), place(teacher, mesh)
        prompts = Prompts(trajectories.prompt, trajectories.prompt_mask)
        written = rollout(
            student, prompts, jax.random.key(1), max_new_tokens=6,
            buckets=(), **ids,
        )  # fmt: skip
        read = jax.jit(functools.partial(annotate, objective=OBJECTIVE, **ids))
        notes = read(student, teacher, trajectories, jax.random.key(0))
        learn = jax.jit(
            functools.partial(update, objective=OBJECTIVE, optimizer=optimizer)
        )
        state, metrics = learn(
            init_state(student, optimizer), teacher.head, trajectories, notes
        )
    words = student.params["params"]["words"]["embedding"]
    assert words.sharding.is_fully_replicated == (not axes), words.sharding
    return jax.device_get((state.student, metrics, notes.distance, written))


def main() -> None:
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected = run(one, None)
    for shape, axes in (((8, 1, 1), None), ((2, 2, 2), AXES)):
        found = run(sharding.make_mesh(*shape), axes)
        for x, y in zip(
            jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)
        print(f"same on {shape}", flush=True)


if __name__ == "__main__":
    main()
