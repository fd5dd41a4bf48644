"""Scores and steps of small models, compiled once an objective."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from conftest import EOS, PAD

from topd_jax.models import causal_mask, unembed
from topd_jax.models.lora import split
from topd_jax.objectives.loading import make_objective
from topd_jax.training.score import score
from topd_jax.training.step import init_state, train_step
from topd_jax.types import Teacher, completion_states

IDS = {"eos_ids": (EOS,), "pad_id": PAD}
# One objective with everything in it: a program is compiled once for all files.
AHEAD = "candidates=3, window=4"
TOPD = f"topd({AHEAD}, guidance_weight=0.3)"
# At rate 1 a step subtracts the gradient itself.
SGD = optax.sgd(1.0)


def sequence(teachers: Any) -> tuple[Teacher, ...]:
    """The teachers of a step; one model is the only one."""
    return teachers if isinstance(teachers, tuple) else (Teacher(teachers),)


@functools.partial(jax.jit, static_argnames=("objective", "seed"))
def scores(student, teachers, trajectories, objective="opd", seed=3):
    return score(
        student, sequence(teachers), trajectories, jax.random.key(seed),
        objective=make_objective(objective), **IDS,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("objective", "accumulate"))
def update(student, trajectories, scored, objective, accumulate):
    return train_step(
        init_state(student, SGD), trajectories, scored, split(student)[1],
        objective=make_objective(objective), optimizer=SGD,
        accumulate=accumulate,
    )  # fmt: skip


def step(student, teachers, trajectories, objective="opd", *, accumulate=1):
    scored = scores(student, teachers, trajectories, objective)
    return update(student, trajectories, scored, objective, accumulate)


# One program, for those who lower it and run nothing.
whole_step = jax.jit(step, static_argnames="objective")


def gradient(before: Any, state: Any) -> Any:
    """What a step with :data:`SGD` followed."""
    return jax.tree.map(lambda a, b: a - b, before, state.student)


@jax.jit
def logp_of(model, rows):
    """f32[B, T, V], dense, by a plain pass."""
    hidden, _ = model(
        rows.sequence, rows.positions, causal_mask(rows.sequence_mask)
    )
    states = completion_states(hidden, rows.prompt.shape[1])
    return jax.nn.log_softmax(unembed(model.head, states))


def assert_trees_close(a: Any, b: Any, **tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)
