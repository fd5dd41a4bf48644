"""The arithmetic of one decoder layer, made of the config's options."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.attention.cache import Cache, write_cache
from topd_jax.models.attention.core import (
    MaskSpec,
    attend,
    attend_cached,
    layer_windows,
)
from topd_jax.models.config import DecoderConfig
from topd_jax.models.experts import ACTIVATIONS, mix
from topd_jax.models.parameters import (
    LORA_A,
    LORA_B,
    as_floats,
    linear_inputs,
    parameter_table,
)
from topd_jax.models.recurrence import read_tokens, split_projections
from topd_jax.models.rope import grow, rope_rows, rotate
from topd_jax.parallel.collectives import to_products, to_rows
from topd_jax.parallel.sharding import constrain

# Below this many ids a lookup by one-hot product is cheaper than a gather,
# whose gradient is a scatter (three times slower on CPU at 100 ids).
_ONE_HOT_VOCAB = 512

# Linear maps of a layer that read the same, and may be one array.
TOGETHER = ("q+k+v", "gate+up")


def rms_norm(
    x: jax.Array, scale: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Compute x / rms(x) * scale in float32 (Zhang & Sennrich, 2019).

    Args:
      x: [..., D].
      scale: [D]; 1 + scale is used where ``config.centered_norms``.
      config: for ``norm_eps`` and ``centered_norms``.

    Returns:
      [..., D] in x's dtype.
    """
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + config.norm_eps)
    if config.centered_norms:  # rounded after scaling, as Gemma does
        return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def embed(
    table: jax.Array, tokens: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Look up rows of table [V, D] for tokens i32[B, S]: [B, S, D]."""
    table = table.astype(config.dtype)
    tokens = to_products(tokens, "sequence")
    if config.vocab_size <= _ONE_HOT_VOCAB:
        one_hot = jax.nn.one_hot(tokens, config.vocab_size, dtype=table.dtype)
        hidden = _linear(one_hot, table)
    else:
        hidden = jnp.take(table, tokens, axis=0)
    hidden = to_products(hidden, "sequence", "activation_embed")
    if config.scaled_embedding:
        hidden = hidden * jnp.asarray(config.width**0.5, hidden.dtype)
    hidden = _times(hidden, config.embedding_multiplier)
    return constrain(hidden, "batch", "sequence", "activation_embed")


def final_norm(
    hidden: jax.Array, scale: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Compute what the output head reads of the last layer's states.

    Args:
      hidden: [B, S, D].
      scale: [D] of the norm.
      config: for the norm, and ``logits_scaling``.

    Returns:
      [B, S, D] in hidden's dtype.
    """
    return _times(rms_norm(hidden, scale, config), 1 / config.logits_scaling)


def _times(x: jax.Array, factor: float) -> jax.Array:
    """Multiply in float32: the factor is not rounded to x's dtype."""
    if factor == 1:
        return x
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def layer_options(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Return what layers differ in beside weights: i32[N] arrays to scan.

    "index": the layer among those of its kind; "rope": its row of the rotary
    table; "window": keys that it attends to.
    """
    kinds = np.asarray(config.recurrent or (False,) * config.layers)
    index = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)) - 1
    return {
        "index": index.astype(np.int32),
        "rope": rope_rows(config),
        "window": layer_windows(config),
    }


def layer(
    config: DecoderConfig,
    carry: tuple[jax.Array, Cache | None],
    w: dict[str, jax.Array],
    options: dict[str, Any],
    *,
    rope: tuple[jax.Array, jax.Array],
    spec: MaskSpec,
) -> tuple[jax.Array, Cache | None]:
    """Compute one layer: attention, then feed-forward, both residual.

    A layer with the parameters of a delta rule has it in attention's place.

    Args:
      config: the decoder's shape.
      carry: (hidden [B, S, D], cache or None).
      w: this layer's parameters, without the stacking dimension.
      options: this layer's entries of :func:`layer_options`; "index" is
        where the cache holds what it keeps.
      rope: from :func:`~topd_jax.models.rope.rope_table`.
      spec: from :func:`~topd_jax.models.attention.core.prepare_mask`.

    Returns:
      (hidden, cache) for the next layer.
    """
    hidden, cache = carry
    w = {name: as_floats(p, config.dtype) for name, p in w.items()}

    def norm(x: jax.Array, name: str) -> jax.Array:
        return rms_norm(x, w[name], config) if name in w else x

    normed = norm(hidden, "attention_norm")
    normed = to_products(normed, "sequence", "activation_embed")
    if "delta_o" in w:
        index = options["index"]
        attended, cache = _recurrent(config, w, normed, cache, index, spec)
    else:
        attended, cache = _attention(
            config, w, normed, cache, options, rope, spec
        )
    attended = to_rows(attended, "sequence", "activation_embed")
    grown = norm(attended, "attention_post_norm")
    hidden = hidden + _times(grown, config.residual_multiplier)
    normed = norm(hidden, "mlp_norm")
    normed = to_products(normed, "sequence", "activation_embed")
    out = _feed_forward(normed, w, config)
    out = to_rows(out, "sequence", "activation_embed")
    grown = norm(out, "mlp_post_norm")
    hidden = hidden + _times(grown, config.residual_multiplier)
    return constrain(hidden, "batch", "sequence", "activation_embed"), cache


def _attention(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    x: jax.Array,
    cache: Cache | None,
    options: dict[str, Any],
    rope: tuple[jax.Array, jax.Array],
    spec: MaskSpec,
) -> tuple[jax.Array, Cache | None]:
    query, gate, key, value = _project_heads(config, w, x)
    turn = [t[options["rope"]] if len(t) > 1 else t[0] for t in rope]
    query, key = (
        rotate(x, *turn, config.interleaved_rope) for x in (query, key)
    )
    if config.rope_scaling is not None and config.rope_scaling.query_beta:
        query = grow(query, spec.query_positions, config.rope_scaling)
    out = None
    query = constrain(query, "batch", "sequence", "activation_heads", None)
    if cache is None:
        key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    else:
        index = options["index"]
        cache, key, value = write_cache(cache, key, value, index)
        out = attend_cached(
            query, cache, index, spec, options["window"], config
        )
    if out is None:
        # Keys and values of all columns: of one layer, and of few heads.
        key, value = (
            constrain(x, "batch", "activation_kv_heads", None, None)
            for x in (key, value)
        )
        out = attend(
            query, key, value, spec, options["window"], config, w.get("sinks")
        )
    # Rows first: a move of heads in their groups is none of one collective.
    out = to_rows(out, "sequence", "activation_heads", None)
    if gate is not None:
        gate = to_rows(gate, "sequence", "activation_heads", None)
        out = out * jax.nn.sigmoid(gate)
    out = to_products(out, "sequence", "heads", None)
    out = _project(out, w, "o", config)
    return out + w["o_bias"] if config.output_bias else out, cache


def _project_heads(
    config: DecoderConfig, w: dict[str, jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Return query, gate, key and value of every token, before they turn."""
    # Told the rows of these alone, the compiler would gather the kernels.
    query, *rest = _project_all(x, w, "q+k+v", config)
    query = to_products(query, "sequence", "heads", None)
    key, value = (to_products(x, "sequence", "kv_heads", None) for x in rest)
    if config.attention_bias:
        query, key = query + w["q_bias"], key + w["k_bias"]
        value = value + w["v_bias"]
    gate = None
    if config.attention_gate:
        query, gate = jnp.split(query, 2, axis=-1)
    if config.qk_norm or config.wide_qk_norm:
        norm = _wide_norm if config.wide_qk_norm else rms_norm
        query = norm(query, w["q_norm"], config)
        key = norm(key, w["k_norm"], config)
    query = to_rows(query, "sequence", "activation_heads", None)
    key, value = (
        to_rows(x, "sequence", "activation_kv_heads", None)
        for x in (key, value)
    )
    return query, gate, key, value


def _recurrent(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    x: jax.Array,
    cache: Cache | None,
    index: jax.Array | None,
    spec: MaskSpec,
) -> tuple[jax.Array, Cache | None]:
    """Read tokens by a gated delta rule, of which no layer is turned."""
    names = ("delta_qkvz", "delta_ba") if config.delta_grouped else (
        "delta_qkv", "delta_z", "delta_b", "delta_a",
    )  # fmt: skip
    projected = [_project(x, w, name, config) for name in names]
    *inputs, gate = split_projections(config, projected)
    out, cache = read_tokens(config, w, inputs, cache, index, spec.order)
    plain = config.replace(centered_norms=False)
    out, gate = (
        constrain(x, "batch", "sequence", "activation_heads", None)
        for x in (out.astype(x.dtype), gate)
    )
    out = rms_norm(out, w["delta_norm"], plain)
    out = (out * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
    out = to_products(out, "sequence", "heads", None)
    return _project(out, w, "delta_o", config), cache


def _wide_norm(
    x: jax.Array, scale: jax.Array, config: DecoderConfig
) -> jax.Array:
    flat = x.reshape(*x.shape[:-2], -1)
    return rms_norm(flat, scale.reshape(-1), config).reshape(x.shape)


def _feed_forward(
    x: jax.Array, w: dict[str, jax.Array], config: DecoderConfig
) -> jax.Array:
    if not config.experts:
        return _mlp(x, w, config)
    out = mix(x, w, config)
    if not config.shared_expert_width:
        return out
    weight = jax.nn.sigmoid(_linear(x, w["shared_router"]))
    names = ("gate", "up", "down")
    shared = {name: w[f"shared_{name}"] for name in names}
    return out + weight * _mlp(x, shared, config)


def _mlp(
    x: jax.Array, w: dict[str, jax.Array], config: DecoderConfig
) -> jax.Array:
    gate, up = _project_all(x, w, "gate+up", config)
    if "gate_bias" in w:
        gate, up = gate + w["gate_bias"], up + w["up_bias"]
    inner = ACTIVATIONS[config.activation](gate) * up
    inner = constrain(inner, "product_batch", "sequence", "activation_mlp")
    out = _project(inner, w, "down", config)
    return out + w["down_bias"] if "down_bias" in w else out


def _project_all(
    x: jax.Array, w: dict[str, jax.Array], together: str, config: DecoderConfig
) -> list[jax.Array]:
    names = together.split("+")
    if together not in w:
        return [_project(x, w, name, config) for name in names]
    table = parameter_table(config)
    shapes = [table[name].shape[2:] for name in names]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = jnp.split(_linear(x, w[together]), ends, axis=-1)
    return [
        part.reshape(*x.shape[:-1], *shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _project(
    x: jax.Array, w: dict[str, jax.Array], name: str, config: DecoderConfig
) -> jax.Array:
    """Compute x W, or x W + scale * (x A) B with an adapter."""
    inputs = linear_inputs(name)
    out = _linear(x, w[name], inputs)
    if config.lora is None or name not in config.lora.targets:
        return out
    # As two thin products: W + A B would be as large as W, and so would its
    # gradient.
    low = _linear(x, w[name + LORA_A], inputs) * config.lora.scale
    return out + _linear(low, w[name + LORA_B])


def _linear(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Compute x [..., I...] @ kernel [I..., O...] as one 2-D product.

    The weight gradient of a 3-D product is three times slower on CPU.
    """
    size = math.prod(kernel.shape[:inputs])
    out = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return out.reshape(*x.shape[:-inputs], *kernel.shape[inputs:])
