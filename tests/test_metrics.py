"""Statistics of student against teacher, beside plain NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import VOCAB, make_model

from topd_jax.evaluation.evaluator import compare
from topd_jax.evaluation.metrics import (
    better,
    distinct_ngrams,
    merge,
    read_metrics,
)
from topd_jax.models import init_decoder
from topd_jax.models.attention.masks import causal_mask


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


look = functools.partial(jax.jit, static_argnames="top_k")(compare)


def assert_close(metrics, expected):
    assert set(metrics) == set(expected)
    for name, (total, count) in expected.items():
        np.testing.assert_allclose(
            metrics[name][0], total, rtol=2e-4, atol=2e-3, err_msg=name
        )
        assert metrics[name][1] == count, name


def test_statistics_are_those_of_plain_numpy(student, teacher, trajectories):
    metrics = look(student, teacher, trajectories, top_k=4)
    assert_close(metrics, dense(student, teacher, trajectories, 4))


def test_a_padded_teacher_is_cut_and_the_dropped_mass_is_told(
    student, trajectories
):
    """And the top sets are of no more ids than there are."""
    config = dataclasses.replace(make_model(1).config, vocab_size=VOCAB + 6)
    padded = init_decoder(config, jax.random.key(3))
    expected = dense(student, padded, trajectories, VOCAB + 9)
    found = look(student, padded, trajectories, top_k=VOCAB + 9)
    assert_close(found, expected)
    total, count = expected["dropped_mass"]
    assert 0.02 < total / count < 0.5
    turned = jax.eval_shape(
        functools.partial(look, top_k=4), padded, student, trajectories
    )
    assert "dropped_mass" not in turned


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams([[7] * 10], 3) == 1 / 8
    assert distinct_ngrams([[1, 2, 3], [1, 2, 3]], 3) == 0.5
    assert distinct_ngrams([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert distinct_ngrams([[1, 2], []], 3) == 0.0


def test_without_answers_the_nearer_student_is_better():
    near, far, broken = ({"reverse_kl": x} for x in (0.1, 0.2, None))
    assert better(near, far) and better(far, broken)
    assert not any(better(broken, than) for than in (near, broken))


def test_sums_are_added_and_divided_once():
    parts = [{"a": (1.0, 2.0)}, {"a": (5.0, 1.0), "b": (jnp.nan, 1.0)}]
    total = merge([*parts, {"c": (0.0, 0.0)}])
    assert total["a"] == (6.0, 3.0)
    assert read_metrics(total) == {"a": 2.0, "b": None, "c": None}
