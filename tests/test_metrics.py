"""Statistics of student against teacher, beside plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, make_model, make_trajectories

from topd_jax.evaluation.metrics import distinct_ngrams, statistics
from topd_jax.models import init_decoder
from topd_jax.models.decoder import causal_mask


def logits(model, rows):
    """f64[B, T, V] by the whole sequence, no helper of the library."""
    hidden, _ = model(
        rows.sequence, rows.positions, causal_mask(rows.sequence_mask)
    )
    prompt = rows.prompt.shape[1]
    hidden = np.asarray(hidden, np.float64)[:, prompt - 1 : -1]
    return hidden @ np.asarray(model.head, np.float64).T


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def dense(student, teacher, rows, k, floor=-100.0):
    vocab = min(student.head.shape[0], teacher.head.shape[0])
    full = log_softmax(logits(teacher, rows))
    q = log_softmax(logits(student, rows)[..., :vocab])
    p = log_softmax(full[..., :vocab])
    low = np.maximum(p, floor)
    tokens = np.asarray(rows.tokens)[..., None]
    ours = np.take_along_axis(q, tokens, -1)[..., 0]
    theirs = np.take_along_axis(low, tokens, -1)[..., 0]
    ratio = theirs - ours
    k = min(k, vocab)
    our_ids = np.argsort(-q, -1, kind="stable")[..., :k]
    their_ids = np.argsort(-p, -1, kind="stable")[..., :k]
    shared = (our_ids[..., :, None] == their_ids[..., None, :]).sum((-2, -1))
    on_ours = np.take_along_axis(np.exp(p), our_ids, -1).sum(-1)
    per_token = {
        "reverse_kl": (np.exp(q) * (q - low)).sum(-1),
        "forward_kl": (np.exp(p) * (low - q)).sum(-1),
        "reverse_kl_k1": -ratio,
        "reverse_kl_k3": np.exp(ratio) - 1 - ratio,
        "student_entropy": -(np.exp(q) * q).sum(-1),
        "teacher_entropy": -(np.exp(p) * p).sum(-1),
        "student_nll": -ours,
        "teacher_nll": -theirs,
        "top_k_mass": on_ours,
        "top_k_overlap": shared / k,
    }
    if full.shape[-1] > vocab:
        per_token["dropped_mass"] = np.exp(full[..., vocab:]).sum(-1)
    mask = np.asarray(rows.mask)
    return {n: (v[mask].sum(), mask.sum()) for n, v in per_token.items()}


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, (total, count) in expected.items():
        np.testing.assert_allclose(
            found[name][0], total, rtol=2e-4, atol=2e-3, err_msg=name
        )
        assert found[name][1] == count, name


@pytest.mark.parametrize("top_k", [1, 4, VOCAB + 9])
def test_statistics_are_those_of_plain_numpy(
    student, teacher, trajectories, top_k
):
    found = jax.jit(statistics, static_argnames="top_k")(
        student, teacher, trajectories, top_k=top_k
    )
    assert_close(found, dense(student, teacher, trajectories, top_k))


def test_the_floor_bounds_the_teacher(student, teacher, trajectories):
    found = statistics(student, teacher, trajectories, top_k=4, log_floor=-3.0)
    expected = dense(student, teacher, trajectories, 4, floor=-3.0)
    other = dense(student, teacher, trajectories, 4)
    assert expected["teacher_nll"][0] < other["teacher_nll"][0] - 1
    for name in ("reverse_kl", "reverse_kl_k1", "teacher_nll"):
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-3)


def test_what_is_masked_does_not_count(student, teacher):
    rows = make_trajectories()
    lengths = rows.mask.sum(1)
    garbage = jnp.where(rows.mask, rows.tokens, 17)
    again = statistics(student, teacher, rows.replace(tokens=garbage))
    half = rows.replace(mask=rows.mask.at[4:].set(False))
    first = jax.tree.map(lambda x: x[:4], rows)
    for name, (total, count) in statistics(student, teacher, rows).items():
        np.testing.assert_allclose(again[name][0], total, rtol=1e-5)
        assert count == lengths.sum()
    found, alone = (statistics(student, teacher, r) for r in (half, first))
    for name, (total, count) in alone.items():
        np.testing.assert_allclose(found[name][0], total, rtol=1e-4, atol=1e-4)
        assert found[name][1] == count == lengths[:4].sum()


def test_nothing_generated_counts_as_nothing(student, teacher, trajectories):
    empty = trajectories.replace(mask=jnp.zeros_like(trajectories.mask))
    for total, count in statistics(student, teacher, empty).values():
        assert total == 0
        assert count == 0


def test_a_student_that_is_the_teacher(teacher, trajectories):
    found = statistics(teacher, teacher, trajectories, top_k=5)
    mean = {n: float(total / count) for n, (total, count) in found.items()}
    for name in ("reverse_kl", "forward_kl", "reverse_kl_k1", "reverse_kl_k3"):
        assert abs(mean[name]) < 1e-5, name
    assert mean["top_k_overlap"] == 1
    assert mean["student_entropy"] == mean["teacher_entropy"]
    assert mean["student_nll"] == pytest.approx(mean["teacher_nll"])


def test_a_padded_teacher_is_cut_and_the_dropped_mass_is_told(
    student, trajectories
):
    config = dataclasses.replace(make_model(1).config, vocab_size=VOCAB + 6)
    padded = init_decoder(config, jax.random.key(3))
    found = statistics(student, padded, trajectories, top_k=4)
    expected = dense(student, padded, trajectories, 4)
    assert_close(found, expected)
    total, count = expected["dropped_mass"]
    assert 0.02 < total / count < 0.5
    assert "dropped_mass" not in statistics(padded, student, trajectories)


@pytest.mark.parametrize(
    ("rows", "n", "share"),
    [
        ([[1, 2, 3, 4]], 3, 1.0),
        ([[7] * 10], 3, 1 / 8),
        ([[1, 2, 3], [1, 2, 3]], 3, 0.5),
        ([[1, 2], []], 3, 0.0),
        ([[1, 2], [2, 1]], 1, 0.5),
    ],
)
def test_distinct_ngrams_by_hand(rows, n, share):
    assert distinct_ngrams(rows, n) == share
