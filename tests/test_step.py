"""One training step, against dense and naive computations of the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_model
from small_step import (
    AHEAD,
    TOPD,
    assert_trees_close,
    assert_trees_equal,
    gradient,
    logp_of,
    scores,
    step,
)

from topd_jax.evaluation.evaluator import compare
from topd_jax.losses import divergences
from topd_jax.models import Decoder, causal_mask, unembed
from topd_jax.models.quantization import quantize
from topd_jax.objectives.loading import make_objective
from topd_jax.training.step import init_state, train_step
from topd_jax.types import Teacher, Trajectories

BF16 = "bfloat16"


def dense_kl(student, teacher, rows):
    values = divergences.reverse_kl(
        logp_of(student, rows), logp_of(teacher, rows)
    )
    return jnp.sum(jnp.where(rows.mask, values, 0.0))


@pytest.fixture(scope="module")
def thin():
    """A student of one layer: compiling it is most of a test's time."""
    return make_model(0, layers=1)


@pytest.fixture(scope="module")
def teachers():
    """Two, of one and three prompts of four."""
    code, math = make_model(1, layers=1, width=24), make_model(2, layers=1)
    return Teacher(code, "code", 1), Teacher(math, "math", 3)


def test_several_teachers_are_one_dense_loss_over_all_tokens(
    thin, teachers, trajectories
):
    rows = {"code": slice(0, 2), "math": slice(2, 8)}
    parts = {
        n: jax.tree.map(lambda x, s=s: x[s], trajectories)
        for n, s in rows.items()
    }

    @jax.jit
    @jax.value_and_grad
    def dense(model):
        sums = [dense_kl(model, t.model, parts[t.name]) for t in teachers]
        return sum(sums) / trajectories.mask.sum()

    value, grads = dense(thin)
    state, metrics = step(thin, teachers, trajectories, accumulate=2)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-5)
    assert_trees_close(gradient(thin, state), grads, atol=1e-5)
    total, count = metrics["divergence"]
    np.testing.assert_allclose(total / count, value, rtol=1e-5)
    assert count == trajectories.mask.sum()
    for name in ("divergence", "teacher_token_loss", "num_tokens"):
        whole, *both = (
            float(metrics[n][0]) for n in (name, f"{name}/code", f"{name}/math")
        )
        assert whole == pytest.approx(sum(both), rel=1e-5)
    for name, part in parts.items():
        assert metrics[f"divergence/{name}"][1] == part.mask.sum()
    lengths = trajectories.mask.sum(axis=1)
    for name in ("", "/code", "/math"):
        own = lengths[rows.get(name[1:], slice(None))]
        assert metrics[f"length_min{name}"][0] == own.min()
        assert metrics[f"length_max{name}"][0] == own.max()


def test_points_of_all_teachers_are_one_mean(thin, teachers, trajectories):
    scored = scores(thin, teachers, trajectories, TOPD)
    _, metrics = step(thin, teachers, trajectories, TOPD)
    parts = [metrics[f"guidance/{t.name}"] for t in teachers]
    points = [n.divergent.sum() for n in scored]
    assert [p[1] for p in parts] == points
    mean = sum(p[0] for p in parts) / sum(points)
    opd = metrics["divergence"][0] / metrics["divergence"][1]
    np.testing.assert_allclose(metrics["loss"][0], opd + 0.3 * mean, rtol=1e-5)


def test_teacher_context_is_the_naive_branch(student, teacher, trajectories):
    """Each branch read on its own, without the other columns."""
    (notes,) = scores(student, teacher, trajectories, TOPD)
    rows = []  # (tokens read, tokens followed) of each branch, on its own
    for b, m in np.argwhere(np.asarray(notes.divergent)):
        t = int(notes.candidates.positions[b, m])
        prompt = trajectories.prompt[b][trajectories.prompt_mask[b]]
        valid = np.asarray(notes.teacher_windows.mask[b, m])
        window = np.asarray(notes.teacher_windows.tokens[b, m])[valid]
        read = np.concatenate([prompt, trajectories.tokens[b, :t]])
        rows.append((read, window))
    width = max(len(r) + len(w) for r, w in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    share = np.zeros((len(rows), width))  # of each token in its row's mean
    for i, (read, window) in enumerate(rows):
        end = len(read) + len(window)
        tokens[i, :end] = np.concatenate([read, window])
        share[i, len(read) : end] = 1 / len(window)

    @jax.jit
    def naive(model):
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        mask = causal_mask(jnp.ones(tokens.shape, bool))
        hidden, _ = model(jnp.asarray(tokens), positions, mask)
        logp = jax.nn.log_softmax(unembed(model.head, hidden))[:, :-1]
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
        return -jnp.sum(chosen * share[:, 1:]) / len(rows)

    value, grads = jax.value_and_grad(naive)(student)
    guided, metrics = step(student, teacher, trajectories, TOPD)
    plain, _ = step(student, teacher, trajectories)
    total, count = metrics["guidance"]
    np.testing.assert_allclose(total / count, value, rtol=1e-5)
    difference = jax.tree.map(
        lambda a, b: (a - b) / 0.3, plain.student, guided.student
    )
    assert_trees_close(difference, grads, atol=2e-5)


def test_a_window_may_be_one_token(student, teacher, trajectories):
    """Its context is the rollout's own: the branch adds no column."""
    text = "topd(candidates=3, window=1, guidance_weight=0.3)"
    (notes,) = scores(student, teacher, trajectories, text)
    rows, slots = np.nonzero(notes.divergent)
    at = np.asarray(notes.candidates.positions)[rows, slots]
    tokens = np.asarray(notes.teacher_windows.tokens)[rows, slots, 0]
    logp = np.asarray(logp_of(student, trajectories))[rows, at, tokens]
    _, metrics = step(student, teacher, trajectories, text)
    total, count = metrics["guidance"]
    np.testing.assert_allclose(total / count, -logp.mean(), rtol=1e-5)


def test_a_branch_divergence_is_nought_for_equals(student, trajectories):
    text = f"topd({AHEAD}, branch_loss='reverse_kl')"
    _, metrics = step(student, make_model(1), trajectories, text)
    assert float(metrics["guidance"][0]) > 0
    _, same = step(student, student, trajectories, text)
    assert abs(float(same["guidance"][0])) < 1e-4


# Weights of the whole batch; draws. The golden numbers have those of rows.
@pytest.mark.parametrize(
    "name", ["tip", pytest.param("trust_region", marks=pytest.mark.slow)]
)
def test_accumulation_changes_nothing(student, teacher, trajectories, name):
    whole, metrics = step(student, teacher, trajectories, name)
    parts, again = step(student, teacher, trajectories, name, accumulate=4)
    np.testing.assert_allclose(metrics["loss"][0], again["loss"][0], rtol=1e-5)
    assert_trees_close(whole.student, parts.student, atol=1e-5)


def test_padding_changes_nothing(student, teacher, trajectories):
    def wider(name):
        left_right = (3, 0) if "prompt" in name else (0, 4)
        return jnp.pad(getattr(trajectories, name), ((0, 0), left_right))

    names = ("prompt", "prompt_mask", "tokens", "mask", "logp")
    padded = Trajectories(
        **{n: wider(n) for n in names}, truncated=trajectories.truncated
    )
    narrow, metrics = step(student, teacher, trajectories, TOPD)
    wide, again = step(student, teacher, padded, TOPD)
    np.testing.assert_allclose(metrics["loss"][0], again["loss"][0], rtol=1e-5)
    assert_trees_close(narrow.student, wide.student, atol=1e-5)


def test_rows_must_fit(student, thin, teacher, teachers, trajectories):
    with pytest.raises(ValueError, match="8 rows must be .* accumulate=3"):
        step(student, teacher, trajectories, accumulate=3)
    with pytest.raises(ValueError, match="2 rows of teacher 'code' .*=4"):
        step(thin, teachers, trajectories, accumulate=4)
    scored = scores(thin, teachers, trajectories)
    fewer = jax.tree.map(lambda x: x[:6], trajectories)
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"scored 2 \+ 6 rows .* have 6"):
        train_step(
            init_state(thin, optimizer), fewer, scored,
            objective=make_objective("opd"), optimizer=optimizer,
        )  # fmt: skip


def test_an_update_that_is_not_finite_is_skipped(teacher, trajectories):
    broken = jax.tree.map(lambda x: x, make_model(0))
    broken.final_norm[...] = broken.final_norm[...].at[0].set(jnp.nan)
    state, metrics = step(broken, teacher, trajectories)
    assert metrics["skipped"][0] == state.skipped == state.step == 1
    assert_trees_close(state.student, broken)


def test_an_empty_batch_is_finite(student, teacher, trajectories):
    empty = trajectories.replace(mask=jnp.zeros_like(trajectories.mask))
    state, metrics = step(student, teacher, empty, TOPD)
    assert metrics["skipped"][0] == metrics["loss"][0] == 0
    assert_trees_close(state.student, student)


def in_bf16(model, *names):
    config = dataclasses.replace(model.config, **dict.fromkeys(names, BF16))
    arrays = {n: x.astype(BF16) for n, x in model.arrays.items()}
    return Decoder(config, arrays)


def test_steps_in_slices_keep_every_type_and_compile_once(
    teacher, trajectories
):
    """Moments in another type would compile the second step again."""
    student = in_bf16(make_model(0), "param_dtype")
    optimizer = optax.adam(1e-3)
    scored = scores(student, teacher, trajectories)
    learn = jax.jit(
        functools.partial(
            train_step, objective=make_objective("opd"), optimizer=optimizer,
            accumulate=4,
        ),
        donate_argnums=0,
    )  # fmt: skip
    state = init_state(student, optimizer)
    types = [x.dtype for x in jax.tree.leaves(state)]
    assert str(types[0]) == "bfloat16"
    for _ in range(2):
        before = jax.tree.leaves(state)
        state, _ = learn(state, trajectories, scored)
        assert [x.dtype for x in jax.tree.leaves(state)] == types
        assert all(x.is_deleted() for x in before)  # each was donated
    assert learn._cache_size() == 1


def test_an_fp32_student_learns_from_a_teacher_in_fewer_bits(
    student, teacher, trajectories
):
    small = quantize(in_bf16(teacher, "param_dtype", "dtype"), "int8")
    (scored,) = scores(student, small, trajectories, TOPD)
    assert scored.teacher_hidden.dtype == jnp.bfloat16
    assert scored.teacher_token_loss.dtype == jnp.float32
    state, metrics = step(student, small, trajectories, TOPD)
    seen = jax.jit(functools.partial(compare, top_k=4))(
        student, small, trajectories
    )
    for name, (total, count) in {**seen, **metrics}.items():
        assert total.dtype == jnp.float32, name
        assert np.isfinite(total) and count >= 0, name
    for name, x in state.student.arrays.items():
        assert x.dtype == jnp.float32 and np.isfinite(x).all(), name
    assert np.abs(state.student.arrays["q"] - student.arrays["q"]).max() > 0


def test_a_fresh_state_leaves_the_students_arrays_alone(student):
    state = init_state(student, optax.adam(1e-3))
    assert_trees_equal(state.student, student)
    jax.tree.map(lambda x: x.delete(), state)
    assert not any(x.is_deleted() for x in jax.tree.leaves(student))
