"""Adapters: the forward pass, what is trained, and merging them away."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_files
from conftest import make_model, make_trajectories
from small_files import logits_of as states
from small_step import scores

from topd_jax.models import (
    Lora,
    add_lora,
    cast,
    causal_mask,
    dequantize,
    merge_lora,
    parameter_table,
)
from topd_jax.models.config import LORA_TARGETS
from topd_jax.models.lora import frozen_fingerprint, join, split
from topd_jax.models.quantization import quantize
from topd_jax.objectives.loading import make_objective
from topd_jax.training.step import init_state, train_step

LORA = Lora(rank=3, alpha=6.0, targets=LORA_TARGETS)


@pytest.fixture(scope="module")
def base(student):
    return student


@pytest.fixture(scope="module")
def adapted(base):
    return small_files.adapted(base, LORA)


TOKENS = jnp.arange(22).reshape(2, 11) * 7 % 40


def test_adapters_start_where_the_model_is(base):
    fresh = add_lora(base, LORA)
    np.testing.assert_array_equal(states(fresh, TOKENS), states(base, TOKENS))
    for name, row in parameter_table(fresh.config).items():
        array = fresh.arrays[name]
        assert (array.shape, row.shape) == (row.shape, array.shape)
        if name.endswith("_lora_b"):
            assert not array.any()
        elif name.endswith("_lora_a"):
            inputs = array[0, ..., 0].size
            assert abs(array.std() * (3 * inputs) ** 0.5 - 1) < 0.25, name


def test_two_thin_products_are_the_merged_map(base, adapted):
    merged = merge_lora(adapted)
    assert merged.config == base.config
    want, got = states(merged, TOKENS), states(adapted, TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert abs(want - states(base, TOKENS)).max() > 0.1
    whole = jax.tree.map(jnp.copy, adapted)
    before = whole.arrays["gate"]
    donated = merge_lora(whole, donate=True).arrays
    for name, array in merged.arrays.items():
        np.testing.assert_array_equal(donated[name], array)
    assert before.is_deleted()
    # By hand, one layer of the map whose input has two dimensions.
    low = adapted.arrays["o_lora_a"][1].reshape(-1, 3)
    low = low @ adapted.arrays["o_lora_b"][1]
    want = base.arrays["o"][1] + 2.0 * low.reshape(base.arrays["o"][1].shape)
    np.testing.assert_allclose(merged.arrays["o"][1], want, atol=1e-6)
    assert LORA.scale == 2.0
    assert dataclasses.replace(LORA, rank_stabilized=True).scale == 6 / 3**0.5


def test_a_model_without_adapters_is_left_alone(base):
    assert merge_lora(base) is base
    assert split(base) == (base, None)
    other = {"w": jnp.ones(3)}
    assert split(other) == (other, None)
    assert join(other, None) is other
    assert frozen_fingerprint(base) == "" == frozen_fingerprint(other)


def test_splitting_copies_nothing_and_joining_undoes_it(adapted):
    trained, frozen = split(adapted)
    again = join(trained, frozen)
    assert again.config == adapted.config
    for name, array in adapted.arrays.items():
        assert again.arrays[name] is array
    assert not any("lora" in name for name in frozen.arrays)
    assert frozen.config.lora is None
    assert len(jax.tree.leaves(trained)) == 2 * len(LORA_TARGETS)


def test_half_precision_keeps_adapters_wide_until_they_are_cast(base):
    fresh = add_lora(cast(base, "bfloat16"), LORA)
    kinds = {n: x.dtype for n, x in fresh.arrays.items()}
    assert kinds["q"] == jnp.bfloat16 and kinds["q_lora_a"] == jnp.float32
    hidden = jax.eval_shape(
        lambda model: model(TOKENS, TOKENS, causal_mask(TOKENS >= 0))[0], fresh
    )
    assert hidden.dtype == jnp.bfloat16
    assert merge_lora(fresh).arrays["q"].dtype == jnp.bfloat16
    assert dequantize(fresh).arrays["q_lora_a"] is fresh.arrays["q_lora_a"]


def test_beside_quantised_matrices_adapters_stay_apart(base):
    fewer = quantize(base, "int8")
    adapted = small_files.adapted(fewer, LORA)
    assert merge_lora(adapted) is adapted
    floats = small_files.adapted(dequantize(fewer), LORA)
    want = states(floats, TOKENS)
    np.testing.assert_allclose(states(adapted, TOKENS), want, atol=1e-5)


def test_what_does_not_fit_is_refused_by_name(adapted):
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(adapted, LORA)
    for wrong, message in (
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"targets": ()}, "must be some of q, k, v, o, gate, up, down"),
        ({"targets": ("q", "head")}, r"\('q', 'head'\) must be some of q, k"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(LORA, **wrong)
    experts = dict(experts=2, experts_per_token=1, expert_width=8)
    with pytest.raises(ValueError, match="up, down are experts'.*: q, k, v, o"):
        dataclasses.replace(adapted.config, **experts)


# The step.


# Its first update is the gradient itself, and it holds a moment.
MOMENTUM = optax.sgd(1.0, momentum=0.9)


def learner(accumulate=1):
    learn = functools.partial(
        train_step, objective=make_objective("opd"), optimizer=MOMENTUM,
        accumulate=accumulate,
    )  # fmt: skip
    return jax.jit(learn, donate_argnums=0)


def assert_followed(before, after, w, moved):
    """Adapters by the chain rule from the gradient of the merged map."""
    for name in LORA_TARGETS:
        n, r = len(w[name]), LORA.rank
        d_w = (w[name] - moved[name]).reshape(n, -1)
        a = before[f"{name}_lora_a"].reshape(n, -1, r)
        b = before[f"{name}_lora_b"].reshape(n, r, -1)
        d_w = d_w.reshape(n, a.shape[1], b.shape[2])
        for suffix, old, want in (
            ("a", a, LORA.scale * d_w @ b.swapaxes(1, 2)),
            ("b", b, LORA.scale * a.swapaxes(1, 2) @ d_w),
        ):
            got = old - after[f"{name}_lora_{suffix}"].reshape(old.shape)
            assert abs(want).max() > 1e-5
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)


def test_only_adapters_are_held_moved_and_donated(base, adapted):
    rows, teacher = make_trajectories(), make_model(1, width=24)
    data = rows, scores(base, teacher, rows)
    trained, frozen = split(jax.tree.map(jnp.copy, adapted))
    bits = jax.device_get(frozen.arrays)
    before = jax.device_get(trained.arrays)
    state = init_state(join(trained, frozen), MOMENTUM)
    size = sum(x.size for x in jax.tree.leaves(trained))
    # Adapters, a moment of each, and two counters.
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * size + 2
    learn = learner(accumulate=2).lower(state, *data, frozen).compile()
    pointers = {n: x.unsafe_buffer_pointer() for n, x in frozen.arrays.items()}
    state, _ = learn(state, *data, frozen)
    merged = merge_lora(adapted)
    w = jax.device_get(merged.arrays)
    whole, _ = learner()(init_state(merged, MOMENTUM), *data)
    after = jax.device_get(state.student.arrays)
    assert_followed(before, after, w, jax.device_get(whole.student.arrays))
    state, metrics = learn(state, *data, frozen)
    assert jnp.isfinite(metrics["loss"][0])
    for name, array in frozen.arrays.items():
        assert array.unsafe_buffer_pointer() == pointers[name]
        np.testing.assert_array_equal(array, bits[name])
    for name, array in state.student.arrays.items():
        assert (np.asarray(array) != after[name]).any(), name
    # The whole state is written where it was; nothing of the base comes out.
    memory = learn.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == held
    assert memory.output_size_in_bytes < held + 1000


def test_the_fingerprint_is_of_what_is_frozen_and_how_it_is_used(base, adapted):
    fresh = add_lora(base, LORA)
    same = frozen_fingerprint(adapted)
    assert len(same) == 64 and frozen_fingerprint(fresh) == same
    louder = add_lora(base, dataclasses.replace(LORA, alpha=7.0))
    other = add_lora(make_model(3), LORA)
    assert len({same, *map(frozen_fingerprint, (louder, other))}) == 3
