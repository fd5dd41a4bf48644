"""Masks, what each layer attends to, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PAD
from small_files import make

from topd_jax.models import DecoderConfig, causal_mask, unembed
from topd_jax.models.attention.core import (
    MaskSpec,
    attend,
    layer_mask,
    layer_windows,
    prepare_mask,
)
from topd_jax.models.attention.masks import (
    BranchMask,
    CachedMask,
    branch_intervals,
    causal_intervals,
    packed_intervals,
)
from topd_jax.sampling import rollout
from topd_jax.types import Prompts, completion_states, positions_of

CONFIG = DecoderConfig(
    vocab_size=40, layers=3, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24, rope_theta=100.0, local_rope_theta=10.0, window=3,
    sliding=(True, False, True), no_rope=(False, False, True), query_scalar=4,
    attention_softcap=2.0, final_softcap=3.0,
)  # fmt: skip


def test_causal_intervals_are_the_causal_mask():
    exists = jnp.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    intervals = causal_intervals(exists)
    np.testing.assert_array_equal(intervals.dense(), causal_mask(exists))
    wide = np.asarray(intervals.widen(7).dense())
    np.testing.assert_array_equal(wide[..., :5], causal_mask(exists))
    assert not wide[..., 5:].any()


def test_packed_intervals_see_their_own_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0]])
    got = np.asarray(packed_intervals(segments).dense())
    for row, col, other in np.ndindex(2, 7, 7):
        same = segments[row, col] == segments[row, other]
        assert got[row, col, other] == (same and other <= col)


def test_branches_see_their_prefix_and_themselves():
    exists = jnp.array([[0, 1, 1, 1]], bool)
    start = jnp.array([[3, 2]])  # columns of the rollout
    window = jnp.array([[[1, 1], [1, 0]]], bool)
    np.testing.assert_array_equal(
        branch_intervals(exists, start, window).dense()[0].astype(int),
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 1, 0, 0, 0],  # replaces column 3
            [0, 1, 1, 0, 1, 1, 0, 0],
            [0, 1, 0, 0, 0, 0, 1, 0],  # replaces column 2
            [0, 1, 0, 0, 0, 0, 1, 0],  # has ended
        ],
    )


def test_the_mask_of_branches():
    sees = BranchMask(
        jnp.arange(9) < jnp.array([[9], [6]]), jnp.array([[1, 3], [2, 0]]), 3
    )
    np.testing.assert_array_equal(
        sees.dense().astype(int),
        [
            [[1, 0, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1, 0, 1]],
            [[1, 1, 0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]],
        ],
    )


def test_the_mask_of_a_cache():
    exists = jnp.array([[0, 1, 1, 1], [1, 1, 1, 1]], bool)
    mask = CachedMask(exists, jnp.int32(3), usual=2).dense()
    assert mask.astype(int).tolist() == [[[0, 1, 1, 0]], [[1, 1, 1, 0]]]


def only(mask):
    """MaskSpec of a layer that does not slide."""
    rows = jnp.zeros((mask.shape[0], mask.shape[2]), jnp.int32)
    return MaskSpec(jnp.asarray(mask), rows, None)


def test_window_over_left_padding():
    exists = jnp.array([[0, 0, 1, 1, 1, 1, 1]], bool)
    positions, intervals = positions_of(exists), causal_intervals(exists)
    spec, _ = prepare_mask(CONFIG, positions, causal_mask(exists), None)
    assert layer_windows(CONFIG).tolist()[::2] == [3, 3]
    got = np.asarray(layer_mask(spec, layer_windows(CONFIG)[0]))[:, 0]
    np.testing.assert_array_equal(
        got[0, 2:, 2:].astype(int),
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
        ],
    )
    assert not got[0, :, :2].any()
    np.testing.assert_array_equal(intervals.within(3).dense(), got)


def test_nothing_is_kept_where_no_layer_slides():
    plain = CONFIG.replace(sliding=())
    assert make(plain).init_cache(2, 5).positions is None
    assert make(CONFIG).init_cache(2, 5).positions.shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("cap", "sinks"), [(0.7, None), (None, (0.3, -1.0, 2.0, 9.0))]
)
def test_attention_against_plain_loops(cap, sinks):
    rng = np.random.default_rng(0)
    config = CONFIG.replace(attention_softcap=cap)
    query = rng.normal(size=(1, 3, 4, 8))
    key, value = rng.normal(size=(2, 1, 2, 5, 8))
    mask = rng.random((1, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    want = np.zeros_like(query)
    for s in range(3):
        for head in range(4):
            scores = key[0, head // 2] @ query[0, s, head] / 2  # sqrt(4)
            if cap:
                scores = cap * np.tanh(scores / cap)
            weights = np.where(mask[0, 0, s], np.exp(scores), 0)
            weights /= weights.sum() + (np.exp(sinks[head]) if sinks else 0)
            want[0, s, head] = weights @ value[0, head // 2]
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    beside = None if sinks is None else jnp.asarray(sinks)
    got = attend(*arrays, only(mask), 5, config, beside)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_capped_scores_of_a_row_that_sees_nothing_are_finite():
    x = jnp.ones((1, 2, 4, 8))
    mask = jnp.zeros((1, 1, 2, 2), bool)

    def total(x):
        key = jnp.swapaxes(x, 1, 2)[:, :2]
        return attend(x, key, key, only(mask), 2, CONFIG).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(x)).all()


# What other families have, each in every program of a model.
GPT_OSS = CONFIG.replace(
    sinks=True, expert_biases=True, swiglu_limit=1.0, experts=4,
    experts_per_token=2, expert_width=12, rotary_dim=4, interleaved_rope=True,
)  # fmt: skip


def forward(model, tokens, mask):
    hidden, _ = model(tokens, positions_of(mask), causal_mask(mask))
    return hidden


def test_rollout_equals_reading_it_again():
    """Through cache and left padding; its log-probabilities are capped."""
    model = make(GPT_OSS)
    mask = jnp.arange(6) >= jnp.array([[0], [2], [5]])
    tokens = jax.random.randint(jax.random.key(1), (3, 6), 3, 40)
    written = rollout(
        model, Prompts(tokens, mask), jax.random.key(0),
        max_new_tokens=9, eos_ids=(), pad_id=PAD,
    )  # fmt: skip
    states = jax.jit(forward)(model, written.sequence, written.sequence_mask)
    logits = unembed(model.head, completion_states(states, 6))
    assert np.abs(logits).max() < 3
    want = jnp.take_along_axis(
        jax.nn.log_softmax(logits), written.tokens[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(written.logp, want, atol=1e-5)


def test_programs_do_not_grow_with_depth():
    def program(layers):
        config = CONFIG.replace(
            layers=layers, sliding=CONFIG.sliding * (layers // 3),
            no_rope=CONFIG.no_rope * (layers // 3),
        )  # fmt: skip
        shapes = jax.eval_shape(lambda: make.__wrapped__(config))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, 4), bool)
        return jax.jit(forward).lower(shapes, tokens, mask).as_text()

    assert len(program(12).splitlines()) == len(program(3).splitlines())
