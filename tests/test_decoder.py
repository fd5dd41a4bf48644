"""The decoder: its equations, gradients, dtypes and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_files import logits_of, make

from topd_jax.models import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    cast,
    parameter_table,
)
from topd_jax.models.layerwise import unstack

BASE = DecoderConfig(
    vocab_size=37, layers=2, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24, rope_theta=100.0, norm_eps=1e-3,
)  # fmt: skip
QWEN = dataclasses.replace(BASE, qk_norm=True, tied=False, head_dim=6)
MIXTURE = dataclasses.replace(
    QWEN, experts=4, experts_per_token=2, expert_width=12,
    shared_expert_width=8,
)  # fmt: skip
WIDE_VOCAB = dataclasses.replace(BASE, vocab_size=600)  # gather, not one-hot


def tokens_for(config, rows=2, length=9, seed=3):
    key = jax.random.key(seed)
    return jax.random.randint(key, (rows, length), 0, config.vocab_size)


def full(tokens):
    return jnp.ones(tokens.shape, bool)


def loss_of(model, tokens, mask):
    logp = jax.nn.log_softmax(logits_of(model, tokens, mask))
    picked = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    return -jnp.sum(picked * mask)


@pytest.mark.parametrize("config", [QWEN, WIDE_VOCAB])
def test_against_plain_loops(config):
    """The equations once more, in NumPy float64, one token at a time."""
    model = make(config)
    tokens = np.asarray(tokens_for(config))
    got = logits_of(model, tokens, full(tokens))
    p = {n: np.asarray(x, np.float64) for n, x in model.arrays.items()}
    group = config.heads // config.kv_heads

    def norm(x, scale):
        square = np.mean(x * x, -1, keepdims=True)
        return x / np.sqrt(square + config.norm_eps) * scale

    def turn(x, position):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / config.head_dim)
            c, s = np.cos(angle), np.sin(angle)
            out[:, i] = x[:, i] * c - x[:, i + half] * s
            out[:, i + half] = x[:, i + half] * c + x[:, i] * s
        return out

    for row in range(2):
        x = p["embedding"][tokens[row]]
        for n in range(config.layers):
            w = {k: v[n] for k, v in p.items() if len(v) == config.layers}
            h = norm(x, w["attention_norm"])
            q, k, v = (np.einsum("td,dhe->the", h, w[a]) for a in "qkv")
            if config.qk_norm:
                q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
            q, k = (np.stack([turn(a[t], t) for t in range(9)]) for a in (q, k))
            for t in range(9):
                for head in range(config.heads):
                    kv = head // group
                    score = k[: t + 1, kv] @ q[t, head]
                    score = np.exp(score / np.sqrt(config.head_dim))
                    score /= score.sum()
                    x[t] += score @ v[: t + 1, kv] @ w["o"][head]
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
        head = p["embedding" if config.tied else "output"]
        want = norm(x, p["final_norm"]) @ head.T
        np.testing.assert_allclose(got[row], want, atol=2e-5)


def test_remat_and_unroll_change_no_gradient():
    """And every layer learns, its experts and the one beside them as well."""
    model, tokens = make(MIXTURE), tokens_for(MIXTURE)
    gradient = jax.jit(jax.grad(loss_of))
    want = gradient(model, tokens, full(tokens)).arrays
    for remat, unroll in (("full", 1), ("dots", 2)):
        config = dataclasses.replace(MIXTURE, remat=remat, unroll=unroll)
        other = Decoder(config, model.arrays)
        got = gradient(other, tokens, full(tokens)).arrays
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    for name, slope in want.items():
        each = np.abs(slope).reshape(len(slope), -1).max(-1)
        assert np.isfinite(each).all() and each.max() > 0, name
        assert name in ("embedding", "output", "final_norm") or each.all(), name


# What neither the loops above nor the tests of one part see.
CHANGES = {
    "wide_qk_norm": True, "attention_bias": True, "output_bias": True,
    "mlp_bias": True, "pre_norms": False, "post_norms": True,
    "centered_norms": True, "activation": "gelu_tanh",
    "scaled_embedding": True, "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0, "rotary_dim": 4, "interleaved_rope": True,
    "rope_scaling": RopeScaling("linear", 3.0),
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_every_config_number_changes_the_logits(field):
    """Fields that leave the parameters' shapes alone must still count."""
    plain = dataclasses.replace(BASE, layers=1)
    model, tokens = make(plain), tokens_for(plain)
    config = dataclasses.replace(plain, **{field: CHANGES[field]})
    arrays = {
        name: model.arrays.get(name, jnp.full(row.shape, 0.7))
        for name, row in parameter_table(config).items()
    }
    want = logits_of(model, tokens, full(tokens))
    got = logits_of(Decoder(config, arrays), tokens, full(tokens))
    assert np.abs(got - want).max() > 1e-3


def test_wrong_arrays_are_named():
    arrays = make(BASE).arrays
    arrays["spare"] = arrays.pop("gate")
    arrays["up"] = arrays["up"][:1]
    with pytest.raises(ValueError, match="gate") as error:
        Decoder(BASE, arrays)
    assert "extra ['spare']" in str(error.value)
    assert "up (1, 16, 24), not (2, 16, 24)" in str(error.value)


def test_cast_keeps_and_computes_in_the_new_dtype():
    model = make(BASE)
    half = cast(model, "bfloat16")
    assert {x.dtype for x in half.arrays.values()} == {jnp.dtype("bfloat16")}
    assert half.config.dtype == half.config.param_dtype == "bfloat16"
    assert half.init_cache(1, 2).keys.dtype == jnp.bfloat16
    back = cast(half, "float32")
    assert back.config == model.config
    assert {x.dtype for x in back.arrays.values()} == {jnp.dtype("float32")}
    assert cast(model, "float32") is model
    tokens = tokens_for(BASE)
    want = logits_of(model, tokens, full(tokens))
    got = logits_of(half, tokens, full(tokens))
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - want).max() < 0.2


@pytest.mark.parametrize(
    ("tokens", "positions", "mask"),
    [((4,), (4,), (4, 4)), ((1, 4), (1, 4), (1, 4)), ((1, 4), (4,), (1, 4, 4))],
)
def test_inputs_of_another_rank_are_refused(tokens, positions, mask):
    ids = jnp.zeros(tokens, jnp.int32), jnp.zeros(positions, jnp.int32)
    said = r"reads tokens \[B, S\] .*not {'tok"
    model = make(dataclasses.replace(BASE, unroll=BASE.layers))
    for reader in (model, unstack(model, 8)):
        with pytest.raises(ValueError, match=said):
            reader(*ids, jnp.zeros(mask, bool))
