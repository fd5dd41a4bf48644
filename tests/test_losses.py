"""Divergences, estimators and the mean, against hand and golden values."""

import functools
import pathlib

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses import divergences

GOLDEN = pathlib.Path(__file__).parent / "golden" / "divergences.npz"
# Golden arrays were made by an independent implementation in torch (TRL),
# which calls forward KL beta 0 and reverse KL beta 1.
CASES = [(beta, t) for beta in (0, 0.5, 1) for t in (1, 2)]

# Two distributions over three tokens, easy to reckon with.
STUDENT = np.log([0.5, 0.25, 0.25])
TEACHER = np.log([0.25, 0.25, 0.5])

DIVERGENCES = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "jsd": functools.partial(divergences.generalized_jsd, beta=0.25),
    "jsd0": functools.partial(divergences.generalized_jsd, beta=0),
    "jsd1": functools.partial(divergences.generalized_jsd, beta=1),
    "top_k": functools.partial(divergences.top_k_reverse_kl, k=3),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def logits_of(seed, shape=(4, 9), scale=3.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)


def logp_of(seed, shape=(4, 9)):
    return divergences.log_softmax(logits_of(seed, shape))


def jsd_of(logits, teacher_logits, beta, temperature):
    return divergences.generalized_jsd(
        divergences.log_softmax(logits / temperature),
        divergences.log_softmax(teacher_logits / temperature),
        beta,
    )


@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_golden_float64(golden, beta, temperature):
    key = f"beta{beta:g}_T{temperature}_f64"
    mask = golden["mask"]
    with jax.enable_x64(True):
        student = jnp.asarray(golden["student_logits"])
        teacher = jnp.asarray(golden["teacher_logits"])

        def loss(logits):
            per_token = jsd_of(logits, teacher, beta, temperature)
            return divergences.weighted_mean(per_token, mask=mask), per_token

        (value, per_token), grad = jax.value_and_grad(loss, has_aux=True)(
            student
        )
        assert value.dtype == grad.dtype == jnp.float64
        summed = np.sum(np.asarray(per_token)[mask])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(value, golden[f"loss_{key}"])
    close(grad, golden[f"grad_{key}"], atol=1e-12)
    close(per_token, golden[f"per_token_{key}"])  # masked tokens as well
    close(summed / 20, golden[f"loss_num_items20_{key}"])


@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_golden_float32(golden, beta, temperature):
    key = f"beta{beta:g}_T{temperature}_f32"
    teacher = jnp.asarray(golden["teacher_logits"], jnp.float32)
    value, grad = jax.value_and_grad(
        lambda logits: divergences.weighted_mean(
            jsd_of(logits, teacher, beta, temperature), mask=golden["mask"]
        )
    )(jnp.asarray(golden["student_logits"], jnp.float32))
    assert value.dtype == grad.dtype == jnp.float32
    np.testing.assert_allclose(value, golden[f"loss_{key}"], rtol=1e-5)
    scale = np.abs(golden[f"grad_{key}"]).max()
    np.testing.assert_allclose(
        grad, golden[f"grad_{key}"], rtol=1e-5, atol=1e-5 * scale
    )


def test_hand_values():
    log2 = np.log(2)
    assert divergences.reverse_kl(STUDENT, TEACHER) == pytest.approx(log2 / 4)
    lopsided = np.log([0.75, 0.25])
    even = np.log([0.5, 0.5])
    there = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    back = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2)
    assert divergences.reverse_kl(lopsided, even) == pytest.approx(there)
    assert divergences.forward_kl(lopsided, even) == pytest.approx(back)
    assert divergences.entropy(STUDENT) == pytest.approx(1.5 * log2)
    assert divergences.cross_entropy(STUDENT, jnp.array(0)) == pytest.approx(
        log2
    )
    assert divergences.token_logprobs(
        STUDENT + 7, jnp.array(2)
    ) == pytest.approx(-2 * log2)


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.9])
def test_jsd_equals_numpy(beta):
    p_s, p_t = np.exp(STUDENT), np.array([0.1, 0.2, 0.7])
    mixture = beta * p_t + (1 - beta) * p_s
    want = beta * np.sum(p_t * np.log(p_t / mixture)) + (1 - beta) * np.sum(
        p_s * np.log(p_s / mixture)
    )
    got = divergences.generalized_jsd(STUDENT, np.log(p_t), beta)
    assert got == pytest.approx(want, rel=1e-5)
    # The test has eyes: swapped weights, and swapped models, differ.
    if beta != 0.5:
        swapped = divergences.generalized_jsd(STUDENT, np.log(p_t), 1 - beta)
        assert abs(swapped - want) > 1e-3


def test_jsd_ends_and_bounds():
    student, teacher = logp_of(0), logp_of(1)
    np.testing.assert_array_equal(
        divergences.generalized_jsd(student, teacher, 0),
        divergences.forward_kl(student, teacher),
    )
    np.testing.assert_array_equal(
        divergences.generalized_jsd(student, teacher, 1.0),
        divergences.reverse_kl(student, teacher),
    )
    for beta in (-0.1, 1.5):
        with pytest.raises(ValueError, match="0..1"):
            divergences.generalized_jsd(student, teacher, beta)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_same_distribution_is_zero(name):
    logp = logp_of(0)
    value, grad = jax.value_and_grad(
        lambda x: jnp.sum(DIVERGENCES[name](divergences.log_softmax(x), logp))
    )(logp)
    assert abs(value) < 1e-5
    assert np.abs(grad).max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_jit_and_vmap_equal_eager(name):
    student, teacher = logp_of(0, (2, 4, 9)), logp_of(1, (2, 4, 9))
    fn = DIVERGENCES[name]
    eager = fn(student, teacher)
    assert eager.shape == (2, 4)
    np.testing.assert_allclose(jax.jit(fn)(student, teacher), eager, 1e-5)
    mapped = jax.vmap(jax.vmap(lambda s, t: fn(s, t)))(student, teacher)
    np.testing.assert_allclose(mapped, eager, 1e-5)


@pytest.mark.parametrize(
    "softmax", [divergences.log_softmax, jax.nn.log_softmax]
)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_for_impossible_tokens(name, who, softmax):
    student, teacher = logits_of(0), logits_of(1)
    cut = jnp.array([0, 3, 8])
    if who != "teacher":
        student = student.at[:, cut].set(-jnp.inf)
    if who != "student":
        teacher = teacher.at[:, cut].set(-jnp.inf)
    loss = jax.value_and_grad(
        lambda s: jnp.sum(DIVERGENCES[name](softmax(s), softmax(teacher)))
    )
    value, grad = jax.jit(loss)(student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))
    assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_for_rows_without_any_token(name):
    rows = jnp.full((2, 5), -jnp.inf)

    @jax.jit
    @jax.value_and_grad
    def loss(s, t):
        s, t = divergences.log_softmax(s), divergences.log_softmax(t)
        return jnp.sum(DIVERGENCES[name](s, t))

    for student, teacher in [
        (rows, rows),
        (rows, logits_of(1, (2, 5))),
        (logits_of(1, (2, 5)), rows),
    ]:
        value, grad = loss(student, teacher)
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))
    np.testing.assert_allclose(divergences.log_softmax(rows), -np.log(5), 1e-6)


def test_impossible_tokens_cost_the_floor():
    # p_S = 0.5 where the teacher has 0: 0.5 (log 0.5 - floor) + 0.5 log 0.5.
    student, teacher = np.log([0.5, 0.5]), np.array([-np.inf, 0.0])
    for floor in (-100.0, -20.0):
        got = divergences.reverse_kl(student, teacher, log_floor=floor)
        assert got == pytest.approx(np.log(0.5) - 0.5 * floor, rel=1e-5)
        # Forward KL divides by the student instead.
        got = divergences.forward_kl(teacher, student, log_floor=floor)
        assert got == pytest.approx(np.log(0.5) - 0.5 * floor, rel=1e-5)
    # p_S = 0 adds nothing.
    got = divergences.reverse_kl(teacher, student)
    assert got == pytest.approx(np.log(2))
    assert divergences.entropy(teacher) == 0
    assert divergences.cross_entropy(teacher, jnp.array(0)) == 100
    assert np.isfinite(divergences.token_logprobs(teacher, jnp.array(0)))


def test_nan_is_not_hidden():
    broken = jnp.array([jnp.nan, 0.0])
    assert jnp.isnan(
        divergences.reverse_kl(divergences.log_softmax(broken), TEACHER[:2])
    )


def test_accumulates_in_float32():
    # 4096 equal tokens in bfloat16: a bfloat16 sum would stall at 256.
    logits = jnp.zeros((4096,), jnp.bfloat16)
    logp = divergences.log_softmax(logits)
    assert logp.dtype == jnp.float32
    np.testing.assert_allclose(logp, -np.log(4096), rtol=1e-6)
    half = logp.astype(jnp.bfloat16)
    for value in (
        divergences.entropy(half),
        divergences.reverse_kl(half, half - 1),
        divergences.generalized_jsd(half, half - 1, 0.5),
        divergences.token_logprobs(logits, jnp.array(0)),
    ):
        assert value.dtype == jnp.float32
    wide = half.astype(jnp.float32)
    assert divergences.entropy(half) == divergences.entropy(wide)
    ones = jnp.ones((4096,), jnp.bfloat16)
    assert divergences.weighted_mean(ones) == 1
    assert divergences.weighted_mean(ones, weights=ones) == 1


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from primitives(sub)


def test_token_logprobs_without_gather():
    logits, tokens = logits_of(0), jnp.array([0, 8, 3, 3])
    want = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), tokens[:, None], -1
    )[:, 0]
    np.testing.assert_allclose(
        divergences.token_logprobs(logits, tokens), want, 1e-5
    )
    np.testing.assert_allclose(
        -divergences.cross_entropy(jax.nn.log_softmax(logits), tokens),
        want,
        1e-5,
    )
    grad_fn = jax.grad(lambda x: jnp.sum(divergences.token_logprobs(x, tokens)))
    one_hot = jax.nn.one_hot(tokens, 9)
    np.testing.assert_allclose(
        grad_fn(logits), one_hot - jax.nn.softmax(logits), atol=1e-6
    )
    used = set(primitives(jax.make_jaxpr(grad_fn)(logits).jaxpr))
    assert not {name for name in used if "gather" in name or "scatter" in name}


def test_top_k_reverse_kl():
    # Kept: the student's first token; the rest is one bin of 0.5 and 0.75.
    want = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    got = divergences.top_k_reverse_kl(STUDENT, TEACHER, 1)
    assert got == pytest.approx(want, rel=1e-5)
    student, teacher = logp_of(0), logp_of(1)
    full = divergences.reverse_kl(student, teacher)
    last = np.zeros(4)
    for k in range(1, 9):
        now = divergences.top_k_reverse_kl(student, teacher, k)
        assert np.all(now >= last - 1e-6)  # finer bins only add
        last = now
    np.testing.assert_allclose(last, full, 1e-5)  # k = V - 1
    np.testing.assert_allclose(
        divergences.top_k_reverse_kl(student, teacher, 99), full, 1e-5
    )
    with pytest.raises(ValueError, match="k=0"):
        divergences.top_k_reverse_kl(student, teacher, 0)


def test_sampled_kl_in_expectation():
    """Exact expectations over the vocabulary, instead of samples."""
    logits, teacher = logits_of(0, (5,), 1.0), logp_of(1, (5,))
    student = divergences.log_softmax(logits)
    p_student = jnp.exp(student)

    def expected(estimator):
        each = divergences.sampled_kl(student, teacher, estimator)
        return jnp.sum(p_student * each)

    kl = divergences.reverse_kl(student, teacher)
    np.testing.assert_allclose(expected("k1"), kl, 1e-5)
    np.testing.assert_allclose(expected("k3"), kl, 1e-5)

    def direct_gradient(estimator):
        def loss(x):  # samples are data: p_student is a constant
            each = divergences.sampled_kl(
                divergences.log_softmax(x), teacher, estimator
            )
            return jnp.sum(p_student * each)

        return jax.grad(loss)(logits)

    def gradient(divergence):
        return jax.grad(
            lambda x: divergence(divergences.log_softmax(x), teacher)
        )(logits)

    reverse, forward = (
        gradient(divergences.reverse_kl),
        gradient(divergences.forward_kl),
    )
    assert np.abs(reverse - forward).max() > 0.01
    np.testing.assert_array_equal(direct_gradient("k1"), 0)
    np.testing.assert_allclose(direct_gradient("k2"), reverse, atol=1e-6)
    np.testing.assert_allclose(direct_gradient("k3"), forward, atol=1e-6)


def test_sampled_kl_hand_values_and_refusals():
    student, teacher = jnp.log(0.5), jnp.log(0.25)
    r = -np.log(2)
    for estimator, want in [
        ("k1", -r),
        ("k2", r * r / 2),
        ("k3", 0.5 - 1 - r),
    ]:
        got = divergences.sampled_kl(student, teacher, estimator)
        assert got == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="expected gradient is zero"):
        divergences.sampled_kl(student, teacher, "k1", direct_loss=True)
    for estimator in ("k2", "k3"):
        divergences.sampled_kl(student, teacher, estimator, direct_loss=True)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        divergences.sampled_kl(student, teacher, "k4")
    for pair in [(-jnp.inf, 0.0), (0.0, -jnp.inf), (-jnp.inf, -jnp.inf)]:
        for estimator in divergences.ESTIMATORS:
            value, grad = jax.value_and_grad(divergences.sampled_kl)(
                jnp.float32(pair[0]), jnp.float32(pair[1]), estimator
            )
            assert np.isfinite(value)
            assert np.isfinite(grad)


def test_weighted_mean_keeps_weights_out_of_the_denominator():
    values = jnp.array([1.0, 2.0, 3.0, 4.0])
    mask = jnp.array([True, True, True, False])
    assert divergences.weighted_mean(values) == 2.5
    assert divergences.weighted_mean(values, mask=mask) == 2.0
    weights = jnp.array([0.5, 0.0, 1.0, 9.0])
    assert divergences.weighted_mean(values, weights, mask) == pytest.approx(
        3.5 / 3
    )
    assert divergences.weighted_mean(values, weights) == pytest.approx(39.5 / 4)
    np.testing.assert_allclose(
        jax.grad(divergences.weighted_mean)(values, weights, mask),
        np.array([0.5, 0, 1, 0]) / 3,
    )
    jitted = jax.jit(divergences.weighted_mean)(values, weights, mask)
    assert jitted == pytest.approx(3.5 / 3)


def test_weighted_mean_masked_equals_sliced():
    values = logits_of(0, (3, 8))
    weights = jnp.abs(logits_of(1, (3, 8)))
    mask = jnp.broadcast_to(jnp.arange(8) < 5, (3, 8))
    np.testing.assert_allclose(
        divergences.weighted_mean(values, weights, mask),
        divergences.weighted_mean(values[:, :5], weights[:, :5]),
        rtol=1e-6,
    )


def test_weighted_mean_ignores_what_is_masked_out():
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    weights = jnp.array([2.0, jnp.inf, jnp.nan])
    mask = jnp.array([True, False, False])
    value, grads = jax.value_and_grad(divergences.weighted_mean, (0, 1))(
        values, weights, mask
    )
    assert value == 2.0
    np.testing.assert_array_equal(grads[0], [2.0, 0, 0])
    np.testing.assert_array_equal(grads[1], [1.0, 0, 0])
    nothing = jnp.zeros(3, bool)
    value, grads = jax.value_and_grad(divergences.weighted_mean, (0, 1))(
        values, weights, nothing
    )
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)
    assert divergences.weighted_mean(jnp.zeros((0,))) == 0
    with pytest.raises(ValueError, match="must be bool"):
        divergences.weighted_mean(values, mask=jnp.ones(3))
