"""Packed rows: their layout, and that nothing but the layout changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, VOCAB, make_model, make_trajectories
from hypothesis import given
from hypothesis import strategies as st

from topd_jax.data.packing import first_fit, pack, row_count
from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.objectives.objective import Objective
from topd_jax.training.sft import annotate_packed, packed_metrics, packed_states
from topd_jax.training.step import annotate, init_state, update

SGD = optax.sgd(1.0)
GOAL = Objective(stage="offline", kd_ratio=0.3)


def pairs_of(trajectories):
    """The rows of a rollout as prompts and completions of their own."""
    rows = jax.device_get(trajectories)
    return [
        (
            rows.prompt[i][rows.prompt_mask[i]],
            rows.tokens[i][rows.mask[i]],
            bool(rows.truncated[i]),
        )
        for i in range(len(rows.tokens))
    ]


def packed(pairs, rows=4, length=40):
    found = first_fit([len(p) + len(c) for p, c, _ in pairs], length)
    shape = (rows, length)
    return jax.tree.map(
        jnp.asarray, pack(pairs, found, shape=shape, pad_id=PAD)
    )


def single(pairs, length):
    rows = [[i] for i in range(len(pairs))]
    return jax.tree.map(
        jnp.asarray, pack(pairs, rows, shape=(len(rows), length), pad_id=PAD)
    )


@functools.partial(jax.jit, static_argnames=("accumulate",))
def learn(student, teacher, rows, accumulate=1):
    notes = annotate_packed(
        student, teacher, rows, objective=GOAL, slices=accumulate
    )
    state, metrics = update(
        init_state(student, SGD), teacher.head, rows, notes,
        objective=GOAL, optimizer=SGD, accumulate=accumulate,
    )  # fmt: skip
    grads = jax.tree.map(lambda a, b: a - b, student, state.student)
    return grads, metrics, notes


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_first_fit_by_hand():
    # 7; 5 + 3; 5 + 2; by falling length, equals in their order.
    assert first_fit([2, 5, 7, 3, 5], 8) == [[2], [1, 3], [4, 0]]
    assert first_fit([], 8) == []
    with pytest.raises(ValueError, match="of 9 tokens .* a row of 8"):
        first_fit([1, 9], 8)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_keeps_everything_once_and_wastes_little(lengths):
    rows = first_fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < u <= 20 for u in used)
    assert len(rows) <= max(1, 11 / 9 * sum(lengths) / 10 + 1)
    assert rows == first_fit(lengths, 20)


@given(st.integers(1, 3000), st.integers(1, 32))
def test_row_counts_are_few_and_near(needed, unit):
    rows = row_count(needed, unit)
    units = -(-needed // unit)
    assert rows % unit == 0
    assert units <= rows // unit <= units * 9 / 8
    counts = {row_count(n, 1) for n in range(1, 257)}
    assert len(counts) <= 16 + 4 * 8


def test_the_layout_by_hand():
    pairs = [
        (np.array([5, 6]), np.array([7, EOS]), False),
        (np.array([8]), np.array([9, 10]), True),
    ]
    rows = pack(pairs, [[1, 0]], shape=(2, 9), pad_id=PAD)
    assert rows.sequence[0].tolist() == [8, 9, 10, 5, 6, 7, EOS, PAD, PAD]
    assert rows.segments[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert rows.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert rows.targets[0].astype(int).tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert rows.truncated.tolist() == [1, 0]
    assert not rows.targets[1].any()
    assert not rows.segments[1].any()
    visible = np.asarray(jax.tree.map(jnp.asarray, rows).spans.dense())[0]
    for i in range(9):
        for j in range(9):
            same = rows.segments[0, i] == rows.segments[0, j]
            assert visible[i, j] == (same and j <= i)


# The second has two rows of padding alone.
@pytest.mark.parametrize(("rows", "accumulate"), [(4, 1), (6, 2)])
def test_packed_is_unpacked_in_value_and_gradient(
    student, teacher, trajectories, rows, accumulate
):
    pairs = pairs_of(trajectories)
    apart = single(pairs, 17)
    together = packed(pairs, rows)
    assert int(together.segments.max()) > 1
    grads, metrics, _ = learn(student, teacher, apart)
    got, other, _ = learn(student, teacher, together, accumulate=accumulate)
    assert_same(got, grads)
    metrics = packed_metrics(apart, metrics)
    other = packed_metrics(together, other)
    for name in set(metrics) - {"filled"}:
        total, count = metrics[name]
        # A row's count of a sum would be another; a solution's is not.
        np.testing.assert_allclose(other[name][0], total, rtol=1e-4)
        np.testing.assert_allclose(other[name][1], count)
    assert other["solutions"][0] == len(pairs)
    assert other["filled"][0] == sum(len(p) + len(c) for p, c, _ in pairs)


def test_unpacked_rows_are_what_a_rollout_gives(student, teacher, trajectories):
    @jax.jit
    def as_rollout(student, teacher, trajectories):
        notes = annotate(
            student, teacher, trajectories, jax.random.key(0),
            objective=GOAL, eos_ids=(EOS,), pad_id=PAD,
        )  # fmt: skip
        return update(
            init_state(student, SGD), teacher.head, trajectories, notes,
            objective=GOAL, optimizer=SGD,
        )  # fmt: skip

    state, want = as_rollout(student, teacher, trajectories)
    rows = packed(pairs_of(trajectories))
    grads, got, notes = learn(student, teacher, rows)
    moved = jax.tree.map(lambda a, b: a - b, student, state.student)
    assert_same(grads, moved)
    for name in (
        "loss", "divergence", "cross_entropy", "teacher_token_loss",
        "num_tokens",
    ):  # fmt: skip
        np.testing.assert_allclose(got[name][0], want[name][0], rtol=1e-5)
    assert notes.teacher_token_loss.shape == rows.tokens.shape


def test_a_segment_is_read_as_if_it_were_alone():
    """Also where layers slide: reach goes by position, not by column."""
    config = DecoderConfig(
        vocab_size=VOCAB, layers=2, width=16, heads=2, kv_heads=2,
        head_dim=8, mlp_width=16, unroll=2, window=3, sliding=(True, False),
    )  # fmt: skip
    model = jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(0))
    pairs = pairs_of(make_trajectories(rows=3))
    read = jax.jit(packed_states)
    together = read(model, packed(pairs, 1, 64))[0]
    order = first_fit([len(p) + len(c) for p, c, _ in pairs], 64)[0]
    begin = 0
    for member in order:
        size = len(pairs[member][0]) + len(pairs[member][1])
        alone = read(model, single([pairs[member]], size))[0]
        np.testing.assert_allclose(
            together[begin : begin + size - 1], alone, rtol=1e-4, atol=1e-5
        )
        begin += size


def test_nothing_to_learn_is_nought_and_finite(student, teacher, trajectories):
    rows = packed(pairs_of(trajectories))
    rows = dataclasses.replace(rows, targets=jnp.zeros_like(rows.targets))
    grads, metrics, _ = learn(student, teacher, rows)
    assert metrics["loss"][0] == 0
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_another_teacher_gives_another_gradient(student, trajectories):
    rows = packed(pairs_of(trajectories))
    a, _, _ = learn(student, make_model(1), rows)
    b, _, _ = learn(student, make_model(2), rows)
    assert any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
