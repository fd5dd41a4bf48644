"""Losses of distributions: by hand, masked, jitted, and where none exists."""

import doctest
import functools
import importlib
import pathlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_heads import traced

import topd_jax
from topd_jax.losses import divergences, estimators, log_probs, token_losses
from topd_jax.losses.divergences import generalized_jsd, weighted_mean
from topd_jax.losses.log_probs import log_softmax

GOLDEN = pathlib.Path(__file__).parent / "golden" / "divergences.npz"
# Two distributions over three tokens, easy to reckon with.
STUDENT, TEACHER = np.log([0.5, 0.3, 0.2]), np.log([0.1, 0.6, 0.3])

reverse_kl, forward_kl = divergences.reverse_kl, divergences.forward_kl
top_k_forward = functools.partial(token_losses.top_k_forward_kl, k=2)
aware = functools.partial(token_losses.entropy_aware_kl, top_k=2, alpha=0.5)


def of_token(fn, *, raw=False, token=0, **options):
    """A loss of tokens, as one of both models' log-probabilities."""

    def loss(student, teacher):
        tokens = jnp.full(student.shape[:-1], token)
        picked = [student, teacher]
        if not raw:
            picked = [log_probs.token_logprobs(p, tokens) for p in picked]
            return fn(*picked, **options)
        return fn(*picked, tokens, jnp.full(tokens.shape, 0.1), **options)

    return loss


trust_region = of_token(token_losses.trust_region_loss, raw=True, top_k=2)
R = np.log(0.2)  # log p_T(0) - log p_S(0)
REVERSE = 0.5 * np.log(5) + 0.3 * np.log(0.5) + 0.2 * np.log(2 / 3)
FORWARD = 0.1 * np.log(0.2) + 0.6 * np.log(2) + 0.3 * np.log(1.5)
# The teacher's first two tokens hold 2/3 and 1/3 of their mass.
FORWARD_2 = 2 / 3 * np.log(2 / 3 / 0.3) + 1 / 3 * np.log(1 / 3 / 0.2)
JSD = 0.25 * np.sum([0.1, 0.6, 0.3] * np.log([0.25, 1.6, 4 / 3])) + (
    0.75 * np.sum([0.5, 0.3, 0.2] * np.log([1.25, 0.8, 8 / 9]))
)
# name -> (loss, value of STUDENT and TEACHER); a KL is 0 of equal models.
LOSSES = {
    "reverse_kl": (reverse_kl, REVERSE),
    "forward_kl": (forward_kl, FORWARD),
    "jsd": (functools.partial(generalized_jsd, beta=0.25), JSD),
    "top-k forward": (top_k_forward, FORWARD_2),
    # The teacher's entropy is 0.8979 nats.
    "undecided": (
        functools.partial(aware, entropy_threshold=0.89),
        REVERSE + FORWARD_2 / 2,
    ),
    "decided": (functools.partial(aware, entropy_threshold=0.9), REVERSE),
    # Inside the region with probability 0.2: the draw is 0.1.
    "trust region": (trust_region, -R * np.log(0.5)),
    "k1": (of_token(estimators.k1), -R),
    "k2": (of_token(estimators.k2), R * R / 2),
    "k3": (of_token(estimators.k3), 0.2 - 1 - R),
}
names = pytest.mark.parametrize("name", LOSSES)


def logits_of(seed, shape=(4, 9), scale=3.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)


@names
def test_by_hand(name):
    """The others are reckoned by hand in their docstrings' examples."""
    loss, want = LOSSES[name]
    assert loss(STUDENT, TEACHER) == pytest.approx(want, rel=2e-6)


@names
def test_finite_where_tokens_are_impossible(name):
    """Some tokens of either or both models; whole rows of either or both."""
    cut = jnp.array([0, 3, 8])
    student = logits_of(0, (6, 9)).at[jnp.array([[0], [2]]), cut].set(-jnp.inf)
    teacher = logits_of(1, (6, 9)).at[jnp.array([[1], [2]]), cut].set(-jnp.inf)
    student = student.at[jnp.array([3, 5])].set(-jnp.inf)
    teacher = teacher.at[jnp.array([4, 5])].set(-jnp.inf)
    loss = LOSSES[name][0]
    # JAX's own log-softmax gives -inf itself, and NaN for whole rows.
    for softmax, rows in ((log_softmax, 6), (jax.nn.log_softmax, 3)):
        value, grad = jax.jit(
            jax.value_and_grad(
                lambda s, t, softmax=softmax: jnp.sum(
                    loss(softmax(s), softmax(t))
                )
            )
        )(student[:rows], teacher[:rows])
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))
        assert (np.abs(grad).max() > 1e-3) == (name != "k1")


def slopes(loss, student, teacher, **options):
    """Gradients of a loss's sum, of both arrays."""
    total = functools.partial(loss, **options)
    return jax.grad(lambda *x: jnp.sum(total(*x)), (0, 1))(student, teacher)


@pytest.mark.parametrize(
    "loss",
    [  # forward KL is reverse KL turned around
        forward_kl,
        LOSSES["jsd"][0],
        lambda s, t, **options: log_probs.entropy(t, **options),
    ],
)
def test_masked_equals_sliced(loss):
    where = np.arange(9) < 5

    @jax.jit
    def ways(student, teacher):
        part = student[:, :5], teacher[:, :5]
        turned = loss(student.T, teacher.T, where=where[:, None], axis=0)
        # What is left out may be anything, also to the gradient.
        anything = [jnp.where(where, x, jnp.nan) for x in (student, teacher)]
        values = loss(*part), loss(student, teacher, where=where), turned
        return values, slopes(loss, *part), slopes(loss, *anything, where=where)

    (want, masked, turned), part, got = ways(logits_of(0), logits_of(1))
    assert_allclose(masked, want, 1e-6)
    assert_allclose(turned, want, 1e-5)
    assert_allclose(got, np.pad(part, ((0, 0), (0, 0), (0, 4))), 1e-5, 1e-6)


@pytest.mark.parametrize(("beta", "temperature"), [(0, 1), (0.5, 2), (1, 1)])
def test_equals_trl(beta, temperature):
    """Recorded from TRL, in torch; beta 0 is forward KL there too."""
    with np.load(GOLDEN) as arrays:
        golden = dict(arrays)
    key, mask = f"beta{beta:g}_T{temperature}_f64", golden["mask"]
    jsd = functools.partial(generalized_jsd, beta=beta)
    with jax.enable_x64(True):
        student, teacher = (
            jnp.asarray(golden[f"{who}_logits"], "float64")
            for who in ("student", "teacher")
        )

        def loss(logits):
            each = divergences.on_logits(
                jsd, logits, teacher, temperature=temperature
            )
            return weighted_mean(each, mask=mask), each

        both = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, each), grad = both(student)
        assert value.dtype == grad.dtype == "float64"
    want = golden[f"grad_{key}"]
    assert_allclose(value, golden[f"loss_{key}"], 1e-6)
    assert_allclose(grad, want, 1e-6, 1e-6 * np.abs(want).max())
    # Of masked tokens as well.
    assert_allclose(each, golden[f"per_token_{key}"], 1e-6)


def test_impossible_tokens_cost_the_floor():
    # p_S = 0.5 where the teacher has 0: 0.5 (log 0.5 - floor) + 0.5 log 0.5.
    even, sure = np.log([0.5, 0.5]), np.array([-np.inf, 0.0])
    for floor in (-100.0, -20.0):
        want = pytest.approx(np.log(0.5) - 0.5 * floor, rel=1e-5)
        assert reverse_kl(even, sure, log_floor=floor) == want
        assert forward_kl(sure, even, log_floor=floor) == want
    assert top_k_forward(sure, np.array([0.0, -np.inf])) == 100
    assert reverse_kl(sure, even) == pytest.approx(np.log(2))  # 0 log 0
    assert log_probs.entropy(sure) == 0
    assert np.isfinite(log_probs.token_logprobs(sure, jnp.array(0)))
    assert_allclose(log_softmax(jnp.full(5, -jnp.inf)), -np.log(5), 1e-6)


def test_what_does_not_exist_is_nan():
    broken = log_softmax(jnp.array([jnp.nan, 0.0, 0.0]))
    assert jnp.isnan(reverse_kl(broken, TEACHER))
    outside, logp = jnp.array([-1, 3]), jnp.tile(STUDENT, (2, 1))
    assert jnp.isnan(log_probs.token_logprobs(logp, outside)).all()


def test_accumulates_in_float32():
    # 4096 equal tokens in bfloat16: a bfloat16 sum would stall at 256.
    half = log_softmax(jnp.zeros((4096,), jnp.bfloat16)).astype(jnp.bfloat16)

    @jax.jit
    def every(logp):
        return [loss(logp, logp - 1) for loss, _ in LOSSES.values()]

    wide = every(half.astype(jnp.float32))
    for value, want in zip(every(half), wide, strict=True):
        assert value.dtype == jnp.float32
        assert_allclose(value, want, 1e-6)
    ones = jnp.ones((4096,), jnp.bfloat16)
    assert weighted_mean(ones, weights=ones) == 1


def test_token_logprobs_without_gather():
    logits, tokens = logits_of(0), jnp.array([0, 8, 3, 3])
    grad_fn = jax.grad(lambda x: jnp.sum(log_probs.token_logprobs(x, tokens)))
    want = jax.nn.one_hot(tokens, 9) - jax.nn.softmax(logits)
    assert_allclose(grad_fn(logits), want, atol=1e-6)
    used = " ".join(e.primitive.name for e in traced(grad_fn, logits))
    assert "exp" in used
    assert "gather" not in used
    assert "scatter" not in used


def test_the_top_k_of_everything_and_of_blocks():
    student, teacher = log_softmax(logits_of(0)), log_softmax(logits_of(1))
    every = token_losses.top_k_forward_kl(student, teacher, 99)
    assert_allclose(every, forward_kl(student, teacher), 1e-5)
    # Within blocks of the vocabulary first, ties with the k-th included.
    values = jnp.round(logits_of(2, (5, 64)))
    kept = divergences.top_k_mask(values, 3)
    assert_array_equal(kept, values >= np.sort(values)[:, -3][:, None])


def test_estimators_in_expectation():
    """Exact expectations over the vocabulary, instead of samples."""
    logits, teacher = logits_of(0, (5,), 1.0), log_softmax(logits_of(1, (5,)))
    p_student = jax.nn.softmax(logits)  # samples are data: a constant

    def expected(estimator):
        return jax.value_and_grad(
            lambda x: jnp.sum(p_student * estimator(log_softmax(x), teacher))
        )(logits)

    def exact(divergence):
        return jax.value_and_grad(
            lambda x: divergence(log_softmax(x), teacher)
        )(logits)

    kl, reverse = exact(reverse_kl)
    _, forward = exact(forward_kl)
    assert np.abs(reverse - forward).max() > 0.01
    (k1, none), (_, of_k2), (k3, of_k3) = map(
        expected, (estimators.k1, estimators.k2, estimators.k3)
    )
    assert_allclose([k1, k3], [kl, kl], 1e-5)
    assert_array_equal(none, 0)
    assert_allclose(of_k2, reverse, atol=1e-6)
    assert_allclose(of_k3, forward, atol=1e-6)


def test_the_trust_region_stops_its_advantage():
    student, teacher = jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8]]))
    rows = jnp.tile(student, (2, 1))
    # Inside where the draw is below p_T / p_S = 1/4.
    slope = jax.grad(
        lambda s: token_losses.trust_region_loss(
            s, jnp.tile(teacher, (2, 1)), jnp.zeros(2, int),
            jnp.array([0.24, 0.26]), top_k=1,
        ).sum()
    )(rows)  # fmt: skip
    # -A d log p_S(0), -A = log 4; outside -d log p_S(1).
    inside = np.log(4) * np.array([0.2, -0.2])
    assert_allclose(slope, [inside, [0, -1]], 1e-5, 1e-7)


def test_weighted_mean():
    values = jnp.array([1.0, 2.0, 3.0, jnp.nan])
    mask = jnp.array([True, True, True, False])
    weights = jnp.array([0.5, 0.0, 1.0, jnp.inf])
    both = jax.jit(jax.value_and_grad(weighted_mean, (0, 1)))
    # The weights stay out of the denominator.
    value, grads = both(values, weights, mask)
    assert value == pytest.approx(3.5 / 3)
    assert_allclose(grads[0], np.array([0.5, 0, 1, 0]) / 3)
    assert_allclose(grads[1], np.array([1.0, 2, 3, 0]) / 3)
    value, grads = both(values, weights, jnp.zeros(4, bool))
    assert value == 0
    assert_array_equal(grads, np.zeros((2, 4)))
    assert weighted_mean(values[:3]) == 2
    assert weighted_mean(jnp.zeros((0,))) == 0


@pytest.mark.parametrize(
    ("loss", "options", "text"),
    [
        (generalized_jsd, {"beta": 1.5}, r"beta=1.5 must lie in 0\.\.1"),
        (reverse_kl, {"log_floor": 0}, "log_floor=0 must be a finite"),
        (reverse_kl, {"where": jnp.ones(3)}, "boolean"),
        (top_k_forward, {"k": 2.5}, "k=2.5 must be a whole number"),
        (aware, {"entropy_threshold": np.nan}, "threshold=nan must"),
        (weighted_mean, {"mask": jnp.ones(3)}, "must be bool"),
        (
            lambda x, _, mask: weighted_mean(x, mask),
            {"mask": jnp.ones(3, bool)},
            "weights are bool.* mask=",
        ),
        (
            functools.partial(divergences.on_logits, reverse_kl),
            {"temperature": 0},
            "temperature=0 must be positive",
        ),
        (lambda s, t: reverse_kl(s, t[:2]), {}, "must have the same shape"),
        (
            lambda s, _: log_probs.token_logprobs(s, jnp.zeros((2,), int)),
            {},
            "one id a distribution",
        ),
    ],
)
def test_what_does_not_fit_is_refused(loss, options, text):
    with pytest.raises(ValueError, match=text):
        loss(STUDENT, TEACHER, **options)


def modules() -> list[str]:
    package = pathlib.Path(topd_jax.__file__).parent
    return [
        f"topd_jax.{room}.{module.name}"
        for room in ("losses", "objectives")
        for module in pkgutil.iter_modules([str(package / room)])
    ]


@pytest.mark.parametrize("name", modules())
def test_examples_of_the_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
