"""Columns spread over devices: the step of one; run by test_sharded.

    python sharded_sequence.py one|others

Attention is in blocks of queries, as where sequences are long.
"""

import math
import sys

import jax
import jax.numpy as jnp
import optax
from conftest import VOCAB, make_model, make_trajectories
from sharded_step import assert_same, place, run

from topd_jax.models.attention import core
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding
from topd_jax.planning import hlo
from topd_jax.training.step import init_state, update
from topd_jax.types import Annotations

# data, fsdp, tensor, expert, sequence; context; slices
CASES = {
    "one": (((1, 2, 2, 1, 2), "student", 2),),
    "others": (
        ((1, 1, 1, 1, 8), "student", 1),
        ((2, 1, 1, 1, 4), "teacher", 2),
    ),
}
COLUMNS, CHUNK, HEADS, HIDDEN = 2048, 256, 4, 32


def learning(mesh: jax.sharding.Mesh) -> hlo.Program:
    """The compiled update by one row of many columns."""
    student, optimizer = make_model(0), optax.sgd(1.0)
    objective = Objective(variant="opd", chunk_size=CHUNK)
    rows = make_trajectories(rows=1, prompt=16, completion=COLUMNS - 16)
    shape = rows.tokens.shape
    notes = Annotations(jnp.zeros((*shape, 16)), jnp.zeros(shape))

    @jax.jit
    def learn(state, head, rows, notes):
        return update(
            state, head, rows, notes, objective=objective, optimizer=optimizer
        )

    with jax.set_mesh(mesh):
        student = place(student, mesh)
        state = init_state(student, optimizer)
        lowered = learn.lower(state, student.head, rows, notes)
        return hlo.parse(lowered.compile().as_text())


def each_has_its_share() -> None:
    """Scores, feed-forward columns and logits: an eighth each."""
    parts = 8
    program = learning(sharding.make_mesh(sequence=parts))
    computed = {
        array.shape
        for place in program.computations.values()
        for one in place.instructions.values()
        for array in one.arrays
        if one.op in ("exponential", "logistic", "dot")
    }
    own = -(-(COLUMNS // parts) // 128) * 128
    most = {
        COLUMNS: HEADS * 128 // parts,  # scores of a block of queries
        VOCAB: own,  # logits of a chunk
        HIDDEN: own,
    }
    for last, others in most.items():
        found = [math.prod(s[:-1]) for s in computed if s and s[-1] == last]
        assert found, (last, computed)
        assert max(found) <= others, (last, computed)
    print("nobody computes another's columns", flush=True)


def main(which: str) -> None:
    core._LONG_SCORES = core._BLOCK_SCORES = 1
    one = sharding.make_mesh(devices=jax.devices()[:1])
    for shape, context, accumulate in CASES[which]:
        objective = Objective(candidates=3, window=4, context=context)
        expected = run(one, objective, 1)
        mesh = sharding.make_mesh(*shape)
        assert_same(expected, run(mesh, objective, accumulate))
        print(f"same on {shape}, {context}, {accumulate}", flush=True)
    if which == "one":
        each_has_its_share()


if __name__ == "__main__":
    main(*sys.argv[1:])
