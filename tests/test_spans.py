"""Spans say what masks say, and long sequences never have a mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, make_model, make_trajectories

from topd_jax.data.packing import PackedRows
from topd_jax.models import Decoder, causal_mask
from topd_jax.models.attention import core
from topd_jax.models.attention.masks import (
    branch_spans,
    causal_spans,
    packed_spans,
)
from topd_jax.models.decoder import mask_for
from topd_jax.objectives.objective import Objective
from topd_jax.planning import hlo
from topd_jax.training.step import annotate, init_state, update


def test_causal_spans_are_the_causal_mask():
    exists = jnp.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    spans = causal_spans(exists)
    np.testing.assert_array_equal(spans.dense(), causal_mask(exists))
    wide = np.asarray(spans.widen(7).dense())
    np.testing.assert_array_equal(wide[..., :5], causal_mask(exists))
    assert not wide[..., 5:].any()


def test_packed_spans_see_their_own_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0]])
    got = np.asarray(packed_spans(segments).dense())
    for row, col, other in np.ndindex(2, 7, 7):
        same = segments[row, col] == segments[row, other]
        assert got[row, col, other] == (same and other <= col)


def test_branches_see_their_prefix_and_themselves():
    exists = jnp.array([[0, 1, 1, 1]], bool)
    start = jnp.array([[3, 2]])  # columns of the rollout
    window = jnp.array([[[1, 1], [1, 0]]], bool)
    np.testing.assert_array_equal(
        branch_spans(exists, start, window).dense()[0].astype(int),
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 1, 0, 0, 0],  # replaces column 3
            [0, 1, 1, 0, 1, 1, 0, 0],
            [0, 1, 0, 0, 0, 0, 1, 0],  # replaces column 2
            [0, 1, 0, 0, 0, 0, 1, 0],  # has ended
        ],
    )


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(core, "_LONG_SCORES", 1)
    monkeypatch.setattr(core, "_BLOCK_SCORES", 1)


@pytest.mark.parametrize("sliding", [False, True])
def test_a_decoder_reads_blocks_of_spans_as_a_mask(request, sliding):
    """Value and gradient, with gaps, a branch and a sliding layer."""
    model = make_model(0)
    if sliding:
        config = dataclasses.replace(
            model.config, window=40, sliding=(True, False)
        )
        model = Decoder(config, model.arrays)
    exists = jnp.arange(150) >= jnp.array([[0], [21]])
    window = jnp.arange(12) < jnp.array([[12, 3], [7, 12]])[..., None]
    spans = branch_spans(exists, jnp.array([[40, 149], [60, 22]]), window)
    tokens = jax.random.randint(jax.random.key(1), (2, 174), 3, 20)
    positions = jnp.cumsum(spans.exists, axis=1, dtype=jnp.int32)
    real = spans.exists[..., None]

    @jax.jit
    @jax.value_and_grad
    def loss(model, mask):
        hidden, _ = model(tokens, positions, mask)
        return jnp.sum(jnp.sin(hidden) * real * jnp.arange(hidden.shape[-1]))

    wanted = loss(model, spans.dense())
    request.getfixturevalue("in_blocks")
    got = loss(model, spans)
    for a, b in zip(*map(jax.tree.leaves, (wanted, got)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def sizes(fn, *args):
    program = hlo.parse(fn.lower(*args).compile().as_text())
    return {
        array.size
        for place in program.computations.values()
        for one in place.instructions.values()
        for array in one.arrays
    }


@pytest.mark.parametrize("context", ["student", "teacher"])
def test_no_phase_makes_a_mask_or_scores_of_all_columns(in_blocks, context):
    """Reading with branches behind, and an update, of 611 columns."""
    student, teacher = make_model(0), make_model(1)
    rows = make_trajectories(rows=1, prompt=11, completion=600)
    objective = Objective(
        candidates=2, window=4, context=context, chunk_size=64
    )
    optimizer = optax.sgd(1.0)

    @jax.jit
    def read(student, teacher, rows, key):
        return annotate(
            student, teacher, rows, key,
            objective=objective, eos_ids=(EOS,), pad_id=PAD,
        )  # fmt: skip

    @jax.jit
    def learn(state, head, rows, notes):
        return update(
            state, head, rows, notes, objective=objective, optimizer=optimizer
        )

    key = jax.random.key(0)
    notes = jax.eval_shape(read, student, teacher, rows, key)
    state = init_state(student, optimizer)
    assert max(sizes(read, student, teacher, rows, key)) < 611**2
    assert max(sizes(learn, state, teacher.head, rows, notes)) < 611**2


def test_no_mask_of_packed_rows(in_blocks):
    model = make_model(0)
    ids = jnp.ones((1, 611), jnp.int32)
    rows = PackedRows(ids, ids, ids, ids > 0, jnp.zeros(1, jnp.int32))

    @jax.jit
    def read(model, rows):
        spans = mask_for(model, rows.spans)
        return model(rows.sequence, rows.positions, spans)[0]

    assert max(sizes(read, model, rows)) < 611**2
