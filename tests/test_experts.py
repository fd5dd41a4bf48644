"""Mixtures of experts: routing, no token dropped, meshes, real sizes."""

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models import DecoderConfig
from topd_jax.models.experts import mix, route

CONFIG = DecoderConfig(
    vocab_size=40, layers=3, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24, experts=4, experts_per_token=2, expert_width=12,
    renormalize=True,
)  # fmt: skip


def weights():
    rng = np.random.default_rng(0)
    shapes = {
        "router": (16, 4), "expert_gate": (4, 16, 12),
        "expert_up": (4, 16, 12), "expert_down": (4, 12, 16),
    }  # fmt: skip
    return {n: rng.normal(size=s) for n, s in shapes.items()}


def dense_loop(x, w, config):
    """Every token by every chosen expert, one at a time, in float64."""
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        scores = token @ w["router"] + w.get("router_bias", 0)
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        chosen = np.argsort(-chances)[: config.experts_per_token]
        total = chances[chosen].sum() if config.renormalize else 1.0
        for e in chosen:
            gate, up = (
                token @ w[f"expert_{name}"][e]
                + (w[f"expert_{name}_bias"][e] if config.expert_biases else 0)
                for name in ("gate", "up")
            )
            if limit := config.swiglu_limit:
                gate = np.minimum(gate, limit)
                up = np.clip(up, -limit, limit) + 1
            alpha = config.swiglu_alpha if limit else 1
            inner = gate / (1 + np.exp(-alpha * gate)) * up
            said = inner @ w["expert_down"][e]
            if config.expert_biases:
                said += w["expert_down_bias"][e]
            out[t] += chances[e] / total * said
    return out


def assert_mix(x, w, config):
    """Compare with the loop; tokens are [T, D]."""
    arrays = {n: jnp.asarray(p, jnp.float32) for n, p in w.items()}
    read = jax.jit(mix, static_argnums=2)
    got = read(jnp.asarray(x, jnp.float32)[None], arrays, config)[0]
    want = dense_loop(x, w, config)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_biased_and_clamped_experts_equal_a_dense_loop():
    rng, w = np.random.default_rng(2), weights()
    w |= {"router_bias": rng.normal(size=4)} | {
        f"expert_{name}_bias": rng.normal(size=(4, width))
        for name, width in (("gate", 12), ("up", 12), ("down", 16))
    }
    x = rng.normal(size=(10, 16))
    assert_mix(x, w, CONFIG.replace(expert_biases=True, swiglu_limit=2.0))


def test_no_token_is_dropped_where_all_want_one_expert():
    w = weights()
    w["router"][:] = 0
    w["router"][0, 3] = 50.0  # every token with x_0 > 0 goes to expert 3
    x = np.abs(np.random.default_rng(1).normal(size=(64, 16)))
    config = CONFIG.replace(experts_per_token=1)
    chosen, _ = route(jnp.asarray(x), jnp.asarray(w["router"]), config)
    assert (np.asarray(chosen) == 3).all()
    assert_mix(x, w, config)


def test_routing_by_hand():
    x = jnp.array([[1.0]])
    router = jnp.log(jnp.array([[1.0, 4.0, 3.0, 2.0]]))
    config = CONFIG.replace(renormalize=False)
    chosen, chances = route(x, router, config)
    np.testing.assert_array_equal(chosen, [[1, 2]])
    np.testing.assert_allclose(chances, [[0.4, 0.3]], rtol=1e-6)
    _, chances = route(x, router, CONFIG)
    np.testing.assert_allclose(chances, [[4 / 7, 3 / 7]], rtol=1e-6)
