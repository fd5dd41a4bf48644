"""Chunked losses equal dense ones, in value, gradient and type."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_heads import (
    DENSE,
    SHAPE,
    D,
    T,
    V,
    assert_close,
    both_faces,
    dense,
    gradients,
    heads,
    logp,
    weights_of,
)

from topd_jax.losses import divergences, fused

GOLDEN = pathlib.Path(__file__).parent / "golden" / "divergences.npz"
# All at once; columns of one, which divide T = 7; columns of two, which do not.
CHUNKS = [None, 2, 5]


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", DENSE)
def test_equals_dense(name, chunk_size):
    arrays, weights = heads(), weights_of()

    def loss(*arrays):
        per_token = dense(name, arrays)
        return jnp.sum(weights * per_token), per_token

    want = gradients(loss, arrays)
    for got in both_faces(
        arrays, weights, divergence=name, beta=0.25, chunk_size=chunk_size
    ):
        assert_close(got, want)


@pytest.mark.parametrize("shape", [(9,), (1, 1), (2, 3, 5), (2, 0)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_any_leading_dimensions_and_temperature(shape, temperature):
    arrays, weights = heads(shape), weights_of(shape)

    def loss(*arrays):
        per_token = dense("jsd", arrays, temperature)
        return jnp.sum(weights * per_token), per_token

    want = gradients(loss, arrays)
    for got in both_faces(
        arrays,
        weights,
        divergence="jsd",
        beta=0.25,
        temperature=temperature,
        chunk_size=4,
    ):
        if math.prod(shape):
            assert_close(got, want)
        else:
            assert got[0][0] == 0
            np.testing.assert_array_equal(got[1][1], 0)


CASES = [(beta, t) for beta in (0, 0.5, 1) for t in (1, 2)]


@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_golden(beta, temperature):
    with np.load(GOLDEN) as file:
        golden = dict(file)
    key = f"beta{beta:g}_T{temperature}_f32"
    names = ["hidden_student", "w_student", "hidden_teacher", "w_teacher"]
    mask = golden["mask"]

    arrays = [jnp.asarray(golden[n], jnp.float32) for n in names]
    weights = jnp.asarray(mask / mask.sum(), jnp.float32)
    for (value, _), grads in both_faces(
        arrays,
        weights,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        chunk_size=6,
    ):
        np.testing.assert_allclose(value, golden[f"chunked_loss_{key}"], 1e-5)
        for got, name in zip(grads, ["hidden", "w"], strict=True):
            want = golden[f"chunked_grad_{name}_{key}"]
            np.testing.assert_allclose(
                got, want, 1e-5, 1e-5 * np.abs(want).max()
            )
    entropies = fused.fused_map(
        lambda student, _: divergences.entropy(student),
        *arrays,
        temperature=temperature,
        chunk_size=6,
    )
    np.testing.assert_allclose(
        entropies[mask].sum(), golden[f"chunked_entropy_sum_{key}"], 1e-5
    )


def test_float64():
    with jax.enable_x64(True):
        arrays = heads(dtype=jnp.float64)
        weights = weights_of().astype(jnp.float64)

        def loss(*arrays):
            per_token = dense("reverse_kl", arrays)
            return jnp.sum(weights * per_token), per_token

        want = gradients(loss, arrays)
        for got in both_faces(arrays, weights, chunk_size=6):
            assert_close(got, want, 1e-12)


def test_jit_vmap_and_traced_temperature():
    arrays, weights = heads(), weights_of()
    fn = functools.partial(fused.fused_divergence, chunk_size=2)
    eager = fn(*arrays)
    np.testing.assert_allclose(jax.jit(fn)(*arrays), eager, 1e-5)
    mapped = jax.vmap(fn, (0, None, 0, None))(*arrays)
    np.testing.assert_allclose(mapped, eager, 1e-5)

    def total(student_hidden, teacher_hidden, weights):
        return fused.fused_weighted_sum(
            student_hidden, arrays[1], teacher_hidden, arrays[3], weights
        )[0]

    whole = jax.grad(total)(arrays[0], arrays[2], weights)
    rows = jax.vmap(jax.grad(total))(arrays[0], arrays[2], weights)
    np.testing.assert_allclose(rows, whole, 1e-5, 1e-6)

    traces = []

    @jax.jit
    def at(temperature):
        traces.append(None)
        return fused.fused_divergence(*arrays, temperature=temperature)

    for temperature in (1.0, 1.7):
        np.testing.assert_allclose(
            at(temperature), dense("reverse_kl", arrays, temperature), 1e-4
        )
    assert len(traces) == 1


def test_teacher_and_weights_are_data():
    arrays, weights = heads(), weights_of()
    grads = jax.grad(
        lambda *a: fused.fused_weighted_sum(*a)[0], (0, 1, 2, 3, 4)
    )(*arrays, weights)
    others = jax.grad(
        lambda *a: jnp.sum(fused.fused_divergence(*a)), (0, 1, 2, 3)
    )(*arrays)
    mapped = jax.grad(
        lambda *a: jnp.sum(fused.fused_map(divergences.reverse_kl, *a)),
        (0, 1, 2, 3),
    )(*arrays)
    assert_close(mapped, others)
    for student in (*grads[:2], *others[:2]):
        assert np.abs(student).max() > 0.01
    for teacher in (*grads[2:], *others[2:], *mapped[2:]):
        np.testing.assert_array_equal(teacher, 0)


def test_token_losses_are_stopped_and_the_sum_scales():
    arrays, weights = heads(), weights_of()

    def loss(scale, *arrays):
        total, each = fused.fused_weighted_sum(*arrays, weights)
        return scale * total + jnp.sum(each)

    once, thrice, never = (
        jax.grad(loss, (1, 2))(scale, *arrays) for scale in (1.0, 3.0, 0.0)
    )
    assert_close(thrice, jax.tree.map(lambda g: 3 * g, once))
    for grad in never:
        np.testing.assert_array_equal(grad, 0)


def test_nothing_counts():
    arrays = heads()
    (total, _), grads = jax.value_and_grad(
        lambda *a: fused.fused_weighted_sum(*a, jnp.zeros(SHAPE)),
        (0, 1),
        has_aux=True,
    )(*arrays)
    assert total == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", DENSE)
def test_finite_for_impossible_tokens(name):
    # Finite heads whose logits overflow to -inf, or underflow in exp.
    arrays = list(heads())
    for states, head in ((0, 1), (2, 3)):
        arrays[states] = 1 + jnp.abs(arrays[states])
        far = arrays[head].at[head].set(-1e6)
        arrays[head] = far.at[head + 5].set(-3e38)
    assert np.all(jnp.isneginf(arrays[0] @ arrays[1][6]))
    for result in both_faces(
        arrays, weights_of(), divergence=name, chunk_size=4
    ):
        for leaf in jax.tree.leaves(result):
            assert np.all(np.isfinite(leaf))


# Vocabularies that differ by padding.


def test_padded_vocabulary_is_cut_and_renormalised():
    arrays, weights = heads(vocab=(V + 5, V + 2)), weights_of()
    shared = V - 1

    def loss(hidden, head, teacher_hidden, teacher_head):
        cut = (hidden, head[:shared], teacher_hidden, teacher_head[:shared])
        per_token = dense("reverse_kl", cut)
        return jnp.sum(weights * per_token), per_token

    want = gradients(loss, arrays)
    np.testing.assert_array_equal(want[1][1][shared:], 0)
    for got in both_faces(arrays, weights, vocab_size=shared, chunk_size=4):
        assert_close(got, want)
    # Without a number, the smaller head decides.
    smaller = (arrays[0], arrays[1][: V + 2], *arrays[2:])
    np.testing.assert_allclose(
        fused.fused_divergence(*arrays), dense("reverse_kl", smaller), 1e-4
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_dropped_mass(chunk_size):
    hidden, head, _, _ = heads()
    p = np.exp(np.asarray(logp(hidden, head, 2.0)))
    np.testing.assert_allclose(
        fused.dropped_mass(
            hidden, head, 20, temperature=2.0, chunk_size=chunk_size
        ),
        p[..., 20:].sum(-1),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(fused.dropped_mass(hidden, head, V), 0)
    # Zero rows beside strongly negative logits take nearly everything.
    padded = jnp.concatenate([jnp.full((10, D), -1.0), jnp.zeros((5, D))])
    assert np.all(fused.dropped_mass(jnp.abs(hidden), padded, 10) > 0.5)


# Statistics and token log-probabilities.


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_map(chunk_size):
    arrays = heads(vocab=(V, V + 3))
    tokens = np.random.default_rng(3).integers(0, V, SHAPE)
    vectors = weights_of((*SHAPE, 3))

    def fn(student, teacher, tokens, vectors):
        return {
            "entropy": divergences.entropy(student),
            "token": divergences.token_logprobs(teacher, tokens),
            "vector": vectors
            * divergences.reverse_kl(student, teacher)[:, None],
        }

    got = jax.jit(lambda *a: fused.fused_map(fn, *a, chunk_size=chunk_size))(
        *arrays, tokens, vectors
    )
    student, teacher = logp(*arrays[:2]), logp(arrays[2], arrays[3][:V])
    want = {
        "entropy": divergences.entropy(student),
        "token": divergences.token_logprobs(teacher, tokens),
        "vector": vectors * divergences.reverse_kl(student, teacher)[..., None],
    }
    assert_close(got, want)

    def total(fn, *heads):
        return jnp.sum(fn(*heads) ** 2)

    grads = jax.grad(
        lambda *a: total(
            functools.partial(
                fused.fused_map, divergences.reverse_kl, chunk_size=chunk_size
            ),
            *a,
            *arrays[2:],
        ),
        (0, 1),
    )(*arrays[:2])
    want = jax.grad(
        lambda *a: total(
            lambda *h: dense("reverse_kl", h), *a, arrays[2], arrays[3][:V]
        ),
        (0, 1),
    )(*arrays[:2])
    assert_close(grads, want)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_token_logprobs(chunk_size):
    hidden, head, _, _ = heads()
    tokens = np.random.default_rng(3).integers(0, V - 3, SHAPE)
    weights = weights_of()

    def chunked(hidden, head):
        per_token = fused.fused_token_logprobs(
            hidden,
            head,
            tokens,
            temperature=1.5,
            vocab_size=V - 3,
            chunk_size=chunk_size,
        )
        return jnp.sum(weights * per_token), per_token

    def whole(hidden, head):
        lp = logp(hidden, head[: V - 3], 1.5)
        per_token = jnp.take_along_axis(lp, tokens[..., None], -1)[..., 0]
        return jnp.sum(weights * per_token), per_token

    assert_close(
        gradients(chunked, (hidden, head)), gradients(whole, (hidden, head))
    )


def test_custom_divergence():
    arrays = heads()
    fn = functools.partial(divergences.top_k_reverse_kl, k=4)
    np.testing.assert_allclose(
        fused.fused_divergence(*arrays, divergence=fn, chunk_size=4),
        fn(logp(*arrays[:2]), logp(*arrays[2:])),
        rtol=1e-4,
    )


# Bad input.


def test_errors_name_value_bound_and_way_out():
    arrays, weights = heads(), weights_of()
    hidden, head = arrays[:2]
    run, sum_of = fused.fused_divergence, fused.fused_weighted_sum
    for call, text in [
        (lambda: run(*arrays, divergence="kl"), "reverse_kl, forward_kl, jsd"),
        (lambda: run(*arrays, divergence="jsd", beta=2), "beta=2"),
        (lambda: run(*arrays, chunk_size=0), "chunk_size=0"),
        (lambda: run(*arrays, temperature=0.0), "temperature=0.0"),
        (lambda: run(*arrays, vocab_size=V + 1), f"1..{V}"),
        (lambda: run(hidden, head.T, *arrays[2:]), "head.T"),
        (lambda: run(hidden[0, 0], *arrays[1:]), r"hidden\[None\]"),
        (lambda: run(hidden[:, 1:], *arrays[1:]), "completion coordinates"),
        (lambda: sum_of(*arrays, weights[:, 1:]), "one entry a token"),
        (
            lambda: fused.fused_token_logprobs(hidden, head, jnp.zeros(T, int)),
            "one entry a state",
        ),
        (lambda: fused.dropped_mass(hidden, head, V + 1), f"1..{V}"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
