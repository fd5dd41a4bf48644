"""Rows of solutions: their layout changes nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import EOS, PAD, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from small_step import SGD, assert_trees_close, gradient

from topd_jax.data.packing import first_fit, pack, row_count, rows_of
from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.training.sft import read_rows, sft_step
from topd_jax.training.step import init_state
from topd_jax.types import Teacher


def pairs_of(trajectories):
    """Return the prompt, the completion, and whether it is cut, of each row."""
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
    members = first_fit([len(p) + len(c) for p, c, _ in pairs], length)
    shape = (rows, length)
    return jax.tree.map(
        jnp.asarray, pack(pairs, members, shape=shape, pad_id=PAD)
    )


@functools.partial(jax.jit, static_argnames=("accumulate", "kd_ratio"))
def learn(student, teacher, rows, accumulate=1, kd_ratio=0.3):
    """Return the gradient and the metrics of a step of stage 1."""
    teachers = (Teacher(teacher),)
    state, metrics = sft_step(
        init_state(student, SGD), rows,
        read_rows(student, teachers, rows, slices=accumulate),
        kd_ratio=kd_ratio, optimizer=SGD, accumulate=accumulate,
    )  # fmt: skip
    return gradient(student, state), metrics


def test_first_fit_by_hand():
    # 7; 5 + 3; 5 + 2; by falling length, equals in their order.
    assert first_fit([2, 5, 7, 3, 5], 8) == [[2], [1, 3], [4, 0]]
    assert first_fit([], 8) == []


@given(st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_keeps_everything_once_and_wastes_little(lengths):
    rows = first_fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < u <= 20 for u in used)
    assert len(rows) <= max(1, 11 / 9 * sum(lengths) / 10 + 1)


@given(st.integers(1, 3000), st.integers(1, 32))
def test_row_counts_are_few_and_near(needed, unit):
    rows = row_count(needed, unit)
    units = -(-needed // unit)
    assert rows % unit == 0
    assert units <= rows // unit <= units * 9 / 8


def test_few_row_counts_occur():
    assert len({row_count(n, 1) for n in range(1, 257)}) <= 16 + 4 * 8


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
    visible = np.asarray(
        jax.tree.map(jnp.asarray, rows).attention_mask.dense()
    )[0]
    same = rows.segments[0][:, None] == rows.segments[0]
    np.testing.assert_array_equal(visible, np.tril(same))


def test_layouts_agree_in_value_and_gradient(teacher, trajectories):
    """In two slices; of the packed rows two are padding alone.

    A layer of the student slides: windows count by position, not by column.
    """
    config = DecoderConfig(
        vocab_size=VOCAB, layers=2, width=16, heads=2, kv_heads=2,
        head_dim=8, mlp_width=16, unroll=2, window=3, sliding=(True, False),
    )  # fmt: skip
    student = jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(0))
    pairs = pairs_of(trajectories)
    together = packed(pairs, 6)
    assert int(together.segments.max()) > 1
    grads, metrics = learn(student, teacher, rows_of(trajectories))
    got, other = learn(student, teacher, together, accumulate=2)
    assert_trees_close(got, grads, rtol=2e-5, atol=2e-6)
    for name in set(metrics) - {"filled"}:
        np.testing.assert_allclose(other[name][0], metrics[name][0], rtol=1e-4)
        np.testing.assert_allclose(other[name][1], metrics[name][1])
    assert other["solutions"][0] == len(pairs)
    filled = sum(len(p) + len(c) for p, c, _ in pairs)
    assert other["filled"][0] == metrics["filled"][0] == filled
    assert other["truncated"][0] == sum(cut for _, _, cut in pairs)
    _, plain = learn(student, teacher, together, kd_ratio=0.0)
    nll, count = plain["cross_entropy"]
    np.testing.assert_allclose(plain["loss"][0], nll / count, rtol=1e-6)
    # Without targets the loss is zero and finite.
    none = dataclasses.replace(
        together, targets=jnp.zeros_like(together.targets)
    )
    grads, metrics = learn(student, teacher, none, accumulate=2)
    assert metrics["loss"][0] == 0
    for grad in jax.tree.leaves(grads):
        assert (np.asarray(grad) == 0).all()
