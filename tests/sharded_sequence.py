"""Columns spread over devices: the step of one; run by test_sharded.

Attention is in blocks of queries, as where sequences are long.
"""

import jax
import optax
from conftest import make_model, make_trajectories
from sharded_step import assert_same, place, run

from topd_jax import sharding
from topd_jax.analysis import hlo
from topd_jax.distill import init_state, update
from topd_jax.models import attention
from topd_jax.objective import Objective
from topd_jax.types import Annotations

# data, fsdp, tensor, expert, sequence
MESHES = (
    ((1, 1, 1, 1, 8), "student", 1),
    ((2, 1, 1, 1, 4), "teacher", 2),
    ((1, 2, 2, 1, 2), "student", 2),
)
COLUMNS = 2048  # of the program that is looked at


def spread() -> None:
    """No device of eight holds the states of all columns, or their scores."""
    mesh = sharding.make_mesh(sequence=8)
    student, optimizer = make_model(0), optax.sgd(1.0)
    objective = Objective(variant="opd", chunk_size=256)
    rows = make_trajectories(rows=1, prompt=16, completion=COLUMNS - 16)
    notes = Annotations(
        jax.numpy.zeros((1, COLUMNS - 16, 16)),
        jax.numpy.zeros((1, COLUMNS - 16)),
    )

    @jax.jit
    def learn(state, head, rows, notes):
        return update(
            state, head, rows, notes, objective=objective, optimizer=optimizer
        )

    with jax.set_mesh(mesh):
        student = place(student, mesh)
        state = init_state(student, optimizer)
        lowered = learn.lower(state, student.head, rows, notes)
        program = hlo.parse(lowered.compile().as_text())
    kinds = ("dot", "exponential", "log", "tanh", "logistic")
    # 32: of a feed-forward layer, the widest.
    large = [
        f"{one.op} of {array}"
        for place in program.computations.values()
        for one in place.instructions.values()
        for array in one.arrays
        if one.op in kinds and array.size >= COLUMNS * 16
    ]
    assert not any(x for x in large if "logistic" in x), large
    print(sorted(set(large)))


def main() -> None:
    attention._LONG_SCORES = attention._BLOCK_SCORES = 1
    one = sharding.make_mesh(devices=jax.devices()[:1])
    for shape, context, accumulate in MESHES:
        objective = Objective(candidates=3, window=4, context=context)
        expected = run(one, objective, 1)
        mesh = sharding.make_mesh(*shape)
        assert_same(expected, run(mesh, objective, accumulate))
        print(f"same on {shape}, {context}, {accumulate}", flush=True)
    spread()


if __name__ == "__main__":
    main()
