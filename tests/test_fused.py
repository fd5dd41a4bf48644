"""Chunked losses equal dense ones in value and gradient, and stay small."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import on_eight_devices
from numpy.testing import assert_allclose, assert_array_equal
from small_heads import (
    SHAPE,
    D,
    T,
    V,
    assert_close,
    both_faces,
    dense,
    dense_gradients,
    gradients,
    heads,
    jsd,
    logp,
    traced,
    weights_of,
)

from topd_jax.losses import chunks, divergences, fused, log_probs, token_losses
from topd_jax.types import CappedHead, Layout, soft_cap

# All at once; columns of one, which divide T = 7; columns of two, which do not,
# in chunks of tokens that do not divide over the devices of their rule.
CHUNKS = [Layout(), Layout(2), Layout(5, {"tokens": 3})]
UNEVEN = CHUNKS[2]
PAIRS = Layout(4)
reverse_kl = divergences.reverse_kl


def capped(student_hidden, student_head, teacher_hidden, teacher_head):
    """Both heads bound their logits, each at its own cap."""
    heads = CappedHead(student_head, 2.0), CappedHead(teacher_head, 3.0)
    return student_hidden, heads[0], teacher_hidden, heads[1]


# Draws of a stochastic loss, and the tokens that it names.
ROWS = {"tokens": jnp.full(SHAPE, 3), "uniforms": weights_of() / 2}
chances = functools.partial(token_losses.trust_region_loss, top_k=4)
CASES = {
    "jsd": (jsd, {"layouts": CHUNKS}),
    "chances": (chances, {"layouts": [UNEVEN], "rows": ROWS}),
    "one token": (jsd, {"temperature": 0.5, "shape": (1,)}),
    "flat": (jsd, {"temperature": 2.0, "shape": (2, 3, 5)}),
    "no token": (jsd, {"shape": (2, 0)}),
    "capped": (jsd, {"temperature": 0.7, "bound": capped}),
    "float64": (reverse_kl, {"dtype": jnp.float64}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_dense(case):
    loss, options = CASES[case]
    options = {"layouts": [PAIRS]} | options
    shape, dtype = options.pop("shape", SHAPE), options.pop("dtype", "float32")
    with jax.enable_x64(dtype == jnp.float64):
        bound = options.pop("bound", lambda *arrays: arrays)
        arrays = bound(*heads(shape, dtype=dtype))
        weights = weights_of(shape).astype(dtype)
        want = dense_gradients(
            functools.partial(loss, **options.get("rows", {})),
            arrays, weights, options.get("temperature", 1.0),
        )  # fmt: skip
        tolerance = 1e-12 if dtype == jnp.float64 else 2e-5
        for layout in options.pop("layouts"):
            options["layout"] = layout
            for got in both_faces(arrays, weights, loss, **options):
                assert_close(got, want, tolerance)


def test_a_cap_by_hand():
    # 2 tanh(1 / 2), 2 tanh(-100 / 2)
    got = soft_cap(jnp.array([0.0, 1.0, -100.0]), 2.0)
    assert_allclose(got, [0, 0.92423431, -2], rtol=1e-6)
    head = CappedHead(jnp.ones((3, 2)), 2.0)[:1]
    assert (head.shape, head.ndim, head.cap) == ((1, 2), 2, 2.0)


def test_a_traced_temperature_compiles_once():
    arrays = heads()
    at = jax.jit(lambda t: fused.fused_divergence(*arrays, temperature=t))
    for temperature in (1.0, 1.7):
        want = dense(reverse_kl, arrays, temperature)
        assert_allclose(at(temperature), want, 1e-4)
    assert at._cache_size() == 1


def test_teacher_and_weights_are_data_and_the_sum_scales():
    arrays, weights = heads(), weights_of()

    def summed(scale, *arrays):
        total, each = fused.fused_weighted_sum(*arrays)
        return scale * total + jnp.sum(each)  # the losses are stopped

    grad = jax.jit(jax.grad(summed, (1, 2, 3, 4, 5)))
    once, thrice, never = (
        grad(scale, *arrays, weights) for scale in (1.0, 3.0, 0.0)
    )
    assert_close(thrice, jax.tree.map(lambda g: 3 * g, once))
    divergence, mapped = (
        jax.jit(jax.grad(lambda *a, fn=fn: jnp.sum(fn(*a)), (0, 1, 2, 3)))(
            *arrays
        )
        for fn in (
            fused.fused_divergence,
            functools.partial(fused.fused_map, reverse_kl),
        )
    )
    assert_close(mapped, divergence)
    for student in (*once[:2], *divergence[:2]):
        assert np.abs(student).max() > 0.01
    for data in (*once[2:], *divergence[2:], *mapped[2:], *never):
        assert_array_equal(data, 0)


def test_a_token_of_weight_zero_counts_for_nothing():
    """0 * NaN is NaN: what does not count is selected away, not multiplied."""
    bad = np.array([1, 0, 1]), np.array([3, 2, 5])
    arrays, weights = list(heads()), weights_of().at[bad].set(0)
    want = dense_gradients(reverse_kl, arrays, weights)
    # NaN in one token's loss, in another's states of either model.
    rows = {"uniforms": jnp.zeros(SHAPE).at[1, 3].set(jnp.nan)}
    arrays[0] = arrays[0].at[0, 2].set(jnp.nan)
    arrays[2] = arrays[2].at[1, 5].set(jnp.nan)

    def loss(student, teacher, uniforms):
        return reverse_kl(student, teacher) * (1 + uniforms)

    for got in both_faces(arrays, weights, loss, rows=rows, layout=UNEVEN):
        (total, each), grads = got
        assert jnp.isnan(each[bad]).all()
        assert_close((total, grads), (want[0][0], want[1]))
    for result in both_faces(arrays, jnp.zeros(SHAPE), loss, rows=rows):
        for leaf in (result[0][0], *result[1]):
            assert_array_equal(leaf, 0)


def test_finite_for_impossible_tokens():
    # Finite heads whose logits overflow to -inf, or underflow in exp.
    arrays = list(heads())
    for states, head in ((0, 1), (2, 3)):
        arrays[states] = 1 + jnp.abs(arrays[states])
        far = arrays[head].at[head].set(-1e6)
        arrays[head] = far.at[head + 5].set(-3e38)
    assert np.all(jnp.isneginf(arrays[0] @ arrays[1][6]))
    results = both_faces(arrays, weights_of(), layout=PAIRS)
    for leaf in jax.tree.leaves(results):
        assert np.all(np.isfinite(leaf))


def test_a_padded_vocabulary_is_cut_and_renormalized():
    arrays, weights, shared = heads(vocab=(V + 5, V + 2)), weights_of(), V - 1

    def cut(hidden, head, teacher_hidden, teacher_head):
        arrays = hidden, head[:shared], teacher_hidden, teacher_head[:shared]
        per_token = dense(reverse_kl, arrays)
        return jnp.sum(weights * per_token), per_token

    want = gradients(cut, arrays)
    assert_array_equal(want[1][1][shared:], 0)
    for got in both_faces(arrays, weights, vocab_size=shared, layout=PAIRS):
        assert_close(got, want)
    # Without a number, the smaller head decides.
    smaller = (arrays[0], arrays[1][: V + 2], *arrays[2:])
    assert_allclose(
        fused.fused_divergence(*arrays), dense(reverse_kl, smaller), 1e-4
    )


def test_statistics():
    arrays = capped(*heads(vocab=(V, V + 3)))
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, V - 3, SHAPE))
    vectors = weights_of((*SHAPE, 3))

    def compare(student, teacher, tokens, vectors):
        return {
            "entropy": log_probs.entropy(student),
            "token": log_probs.token_logprobs(teacher, tokens),
            "vector": vectors * reverse_kl(student, teacher)[..., None],
        }

    def mapped(hidden, head):
        out = fused.fused_map(
            compare, hidden, head, *arrays[2:], tokens, vectors, layout=UNEVEN
        )
        return jnp.sum(out["vector"] ** 2), out

    def whole(hidden, head):
        teacher = logp(arrays[2], arrays[3][:V])
        out = compare(logp(hidden, head), teacher, tokens, vectors)
        return jnp.sum(out["vector"] ** 2), out

    def chunked(hidden, head):
        out = fused.fused_token_logprobs(
            hidden, head, tokens, temperature=1.5, vocab_size=V - 3,
            layout=UNEVEN,
        )  # fmt: skip
        return jnp.sum(vectors[..., 0] * out), out

    def picked(hidden, head):
        out = logp(hidden, head[: V - 3], 1.5)
        out = jnp.take_along_axis(out, tokens[..., None], -1)[..., 0]
        return jnp.sum(vectors[..., 0] * out), out

    for got, want in ((mapped, whole), (chunked, picked)):
        assert_close(gradients(got, arrays[:2]), gradients(want, arrays[:2]))


def test_dropped_mass():
    hidden, head = heads()[:2]
    mass = functools.partial(fused.dropped_mass, layout=UNEVEN)
    for bound in (head, CappedHead(head, 2.0)):
        want = np.exp(logp(hidden, bound))[..., 20:].sum(-1)
        assert_allclose(mass(hidden, bound, 20), want, rtol=1e-5)
    assert_array_equal(mass(hidden, head, V), 0)
    # Zero rows beside strongly negative logits take nearly everything.
    padded = jnp.concatenate([jnp.full((10, D), -1.0), jnp.zeros((5, D))])
    assert np.all(mass(jnp.abs(hidden), padded, 10) > 0.5)


def test_bfloat16_accumulates_in_float32():
    # 512 tokens, each adding a little to the same entries of the head's
    # gradient: a bfloat16 sum would lose what is below 1/256 of it.
    rng = np.random.default_rng(0)
    state, head, teacher_head = rng.normal(size=(3, V, D))
    states = [np.tile(state[i], (512, 1)) for i in range(2)]
    arrays = [
        jnp.asarray(x, jnp.bfloat16)
        for x in (states[0], head, states[1], teacher_head)
    ]
    weights, single = jnp.ones(512), Layout(1)
    wide = [x.astype(jnp.float32) for x in arrays]
    want = dense_gradients(reverse_kl, wide, weights)

    def mapped(*arrays):
        out = fused.fused_map(reverse_kl, *arrays, layout=single)
        return jnp.sum(weights * out), out

    for (value, per_token), grads in (
        *both_faces(arrays, weights, layout=single),
        gradients(mapped, arrays),
    ):
        assert value.dtype == per_token.dtype == jnp.float32
        assert_allclose(value, want[0][0], 1e-5)
        for got, exact in zip(grads, want[1], strict=True):
            assert got.dtype == jnp.bfloat16
            error = np.abs(np.asarray(got, np.float32) - exact).max()
            assert error < 0.01 * np.abs(exact).max()


def largest(fn, *args):
    return max(
        math.prod(v.aval.shape) for e in traced(fn, *args) for v in e.outvars
    )


def products(fn, *args):
    return sum(e.primitive.name == "dot_general" for e in traced(fn, *args))


def test_no_array_of_all_logits_and_no_product_twice():
    shape, vocab, layout = (2, 64), 512, Layout(8)
    arrays, weights = heads(shape, (vocab, vocab)), weights_of(shape)
    logits = math.prod(shape) * vocab
    whole = jax.grad(lambda *a: jnp.sum(dense(reverse_kl, a)), (0, 1))
    assert largest(whole, *arrays) == logits

    def token_logprobs(hidden, head, *_, **options):
        tokens = jnp.zeros(shape, int)
        return fused.fused_token_logprobs(hidden, head, tokens, **options)

    # Products of the value alone; with gradients two more for each model that
    # is trained, and those that are recomputed.
    for count, with_gradient, face in (
        (2, 6, fused.fused_divergence),
        (2, 4, lambda *a, **o: fused.fused_weighted_sum(*a, weights, **o)[0]),
        (2, 6, functools.partial(fused.fused_map, reverse_kl)),
        (1, 4, lambda h, w, *_, **o: fused.fused_log_normalizer(h, w, **o)),
        (1, 4, token_logprobs),
    ):
        face = functools.partial(face, layout=layout)
        grad = jax.grad(lambda *a, face=face: jnp.sum(face(*a)), (0, 1))
        assert products(face, *arrays) == count
        assert products(grad, *arrays) == with_gradient
        assert largest(grad, *arrays) <= logits / 8


def test_chunk_size_from_the_shapes():
    here, half = Layout(), Layout(ways={"vocab": 2, "tokens": 4})
    for vocab in (1, 100, 4096, 32768, 151_936, 10**7):
        tokens = chunks.chunk_tokens(vocab, here)
        assert 256 <= tokens <= 4096
        assert tokens in (256, 4096) or tokens * vocab * 4 <= 2**25
    assert chunks.chunk_tokens(32768, here) == 256
    # Per device: half the vocabulary, a quarter of the rows.
    assert chunks.chunk_tokens(32768, half) == 2 * 4 * 256
    # Small problems run in one chunk, without a scan.
    names = {e.primitive.name for e in traced(fused.fused_divergence, *heads())}
    assert "scan" not in names


def test_eight_devices_of_any_mesh_equal_one():
    said = on_eight_devices("sharded_chunks.py", "meshes")
    assert said.count("equal one device") == 3


def test_a_forward_derivative_is_refused():
    hidden, *rest = heads()

    def total(x):
        return fused.fused_weighted_sum(x, *rest, weights_of())[0]

    refused = pytest.raises(TypeError, match="reverse-mode derivative only")
    with refused:
        jax.jvp(
            lambda x: fused.fused_divergence(x, *rest), (hidden,), (hidden,)
        )
    with refused:
        jax.jacfwd(total)(hidden)
    # Forward over reverse works, and other errors are kept.
    jax.eval_shape(lambda x: jax.jvp(jax.grad(total), (x,), (x,)), hidden)
    with pytest.raises(TypeError, match="unexpected"):
        fused.fused_divergence(hidden, *rest, rows={"wings": hidden})


def test_errors_name_value_bound_and_way_out():
    arrays, weights = heads(), weights_of()
    hidden, head = arrays[:2]
    run, sum_of = fused.fused_divergence, fused.fused_weighted_sum
    for call, text in [
        (lambda: Layout(0), "chunk_size=0"),
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
