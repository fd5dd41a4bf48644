"""Layers that keep a recurrent state: which token follows which, and the layer.

A layer of :mod:`topd_jax.models.delta_rule` stands where attention would.
Attention may read keys in any order, told by a mask; a state must know which
token each one follows, and which state a branch starts from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.attention.cache import Cache
from topd_jax.models.attention.masks import (
    BranchMask,
    CachedMask,
    IntervalMask,
    Mask,
    RolloutMask,
)
from topd_jax.models.config import DecoderConfig
from topd_jax.models.delta_rule import Inputs, read_chunks, read_step
from topd_jax.models.experts import ACTIVATIONS
from topd_jax.parallel.sharding import constrain


class TokenOrder(NamedTuple):
    """Which token each one follows, for layers that read in order.

    Attributes:
      exists: bool[B, S] tokens that are no padding; the others change no
        state, but to the convolution they are columns of zeros: those of a
        segment stand together.
      age: i32[B, S] tokens of its own segment before each one; None where
        each is the newest of a row, or of a branch, of the cache.
      leaves: i32[B, M] columns at which branches leave a rollout; None
        without branches.
      read: columns of the rollout, behind which the branches' tokens are.
    """

    exists: jax.Array
    age: jax.Array | None = None
    leaves: jax.Array | None = None
    read: int = 0


def token_order(mask: Mask, cache: Cache | None, count: int) -> TokenOrder:
    """Tell which token each one follows.

    Args:
      mask: as a decoder takes it. Of bool[B, S, L] a token that attends to
        no column before its own begins a segment.
      cache: to which the tokens are appended, or None.
      count: S, of the tokens.
    """
    start = 0 if cache is None else cache.length
    if isinstance(mask, BranchMask | CachedMask):
        return TokenOrder(jnp.ones((mask.exists.shape[0], count), bool))
    if isinstance(mask, RolloutMask):
        order = token_order(mask.intervals, cache, count)
        return order._replace(leaves=mask.leaves, read=mask.read)
    column = start + jnp.arange(count, dtype=jnp.int32)
    if isinstance(mask, IntervalMask):
        exists = jax.lax.dynamic_slice_in_dim(mask.exists, start, count, 1)
        return TokenOrder(exists, column - mask.first)
    exists = jnp.take_along_axis(mask, column[None, :, None], axis=2)[..., 0]
    earlier = jnp.arange(mask.shape[2]) < column[:, None]
    first = jnp.where(jnp.any(mask & earlier, axis=2), 0, column)
    return TokenOrder(exists, column - jax.lax.cummax(first, axis=1))


def empty_states(
    config: DecoderConfig, rows: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return what a layer keeps before it has read anything.

    Args:
      config: the decoder's shape.
      rows: leading dimensions, (B,) or (B, M).

    Returns:
      (states f32[*rows, H, K, V]; inputs of the convolution [*rows, W, C] in
      compute dtype, W one less than it reads).
    """
    c = config
    heads, k, v = c.delta_value_heads, c.delta_key_dim, c.delta_value_dim
    channels = 2 * c.delta_key_heads * k + heads * v
    states = jnp.zeros((*rows, heads, k, v), jnp.float32)
    inputs = jnp.zeros((*rows, c.delta_conv - 1, channels), c.dtype)
    whole = ("batch", *(None,) * (len(rows) - 1))
    return (
        constrain(states, *whole, "activation_heads", None, None),
        constrain(inputs, *whole, None, None),
    )


def split_projections(
    config: DecoderConfig, projected: list[jax.Array]
) -> tuple[jax.Array, ...]:
    """Tell apart what the maps of a layer make of its input.

    Args:
      config: the decoder's shape.
      projected: outputs of "delta_qkvz" [B, S, heads, *] and "delta_ba", or
        of "delta_qkv" [B, S, C], "delta_z", "delta_b" and "delta_a".

    Returns:
      (queries, keys and values [B, S, C]; rates [B, S, H] before the sigmoid;
      steps [B, S, H] before the softplus; gates [B, S, H, V]).
    """
    if not config.delta_grouped:
        mixed, gate, rate, step = projected
        return mixed, rate, step, gate
    k, v = config.delta_key_dim, config.delta_value_dim
    rows = projected[0].shape[:2]
    each = config.delta_value_heads // config.delta_key_heads
    *qkv, gate = jnp.split(projected[0], np.cumsum([k, k, each * v]), axis=-1)
    mixed = jnp.concatenate([x.reshape(*rows, -1) for x in qkv], axis=-1)
    rate, step = jnp.split(projected[1], 2, axis=-1)
    rate, step = (x.reshape(*rows, -1) for x in (rate, step))
    return mixed, rate, step, gate.reshape(*rows, -1, v)


def read_tokens(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    inputs: Sequence[jax.Array],
    cache: Cache | None,
    index: jax.Array | None,
    order: TokenOrder,
) -> tuple[jax.Array, Cache | None]:
    """Read the tokens of a call in one layer.

    Args:
      config: the decoder's shape.
      w: the layer's parameters.
      inputs: the first three of :func:`split_projections`.
      cache: whose states are read and replaced, or None.
      index: i32[] of the layer among the recurrent ones of the cache; None
        where the cache is of one layer.
      order: of the tokens.

    Returns:
      (outputs f32[B, S, H, V], cache).
    """
    exists = order.exists[..., None]
    mixed, rate, step = inputs
    # The states of a row are read in order: its tokens stay together.
    mixed = constrain(mixed, "batch", None, None)
    rate, step = (
        constrain(x, "batch", None, "activation_heads") for x in (rate, step)
    )
    mixed = jnp.where(exists, mixed, 0)
    rate = jnp.where(exists, jax.nn.sigmoid(rate).astype(jnp.float32), 0)
    step = jax.nn.softplus(step.astype(jnp.float32) + w["delta_dt_bias"])
    decay = -jnp.exp(w["delta_a_log"].astype(jnp.float32)) * step
    tokens = _Tokens(mixed, jnp.where(exists, decay, 0), rate, order.age)
    if cache is None or order.leaves is not None:
        state, before = empty_states(config, mixed.shape[:1])
    elif index is None:
        state, before = cache.states, cache.inputs
    else:
        state, before = cache.states[index], cache.inputs[index]
    if order.age is None:
        out, *kept = _read_newest(config, w, tokens, state, before)
    elif order.leaves is None:
        out, *kept = _read_row(config, w, tokens, state, before)
    else:
        read, leaves = order.read, order.leaves
        rollout = jax.tree.map(lambda x: x[:, :read], tokens)
        out, *kept = _read_row(config, w, rollout, state, before, leaves)
        if mixed.shape[1] > read:
            rest = jax.tree.map(lambda x: x[:, read:], tokens)
            along = _read_branches(config, w, rest, *kept)
            out = jnp.concatenate([out, along], axis=1)
    if cache is None:
        return out, None
    if index is not None:
        held = cache.states, cache.inputs
        kept = [x.at[index].set(y) for x, y in zip(held, kept, strict=True)]
    return out, cache.replace(states=kept[0], inputs=kept[1])


class _Tokens(NamedTuple):
    """S tokens before the convolution.

    Attributes:
      mixed: [B, S, C] queries, keys and values.
      log_decay: f32[B, S, H].
      rate: f32[B, S, H].
      age: i32[B, S], of :class:`TokenOrder`.
    """

    mixed: jax.Array
    log_decay: jax.Array
    rate: jax.Array
    age: jax.Array | None


def _read_newest(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    tokens: _Tokens,
    state: jax.Array,
    before: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Read one token of each state: of a row, or S branches of it."""
    rows = tokens.mixed.shape[:2]
    window = before.reshape(*rows, *before.shape[-2:])
    window = jnp.concatenate([window, tokens.mixed[:, :, None]], axis=2)
    mixed = jnp.sum(
        window.astype(jnp.float32) * jnp.swapaxes(_kernel(w), 0, 1), axis=2
    ).astype(window.dtype)
    x = _inputs(config, tokens._replace(mixed=mixed))
    out, after = read_step(x, state.reshape(*rows, *state.shape[-3:]))
    return (
        out,
        after.reshape(state.shape),
        window[:, :, 1:].reshape(before.shape),
    )


def _read_row(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    tokens: _Tokens,
    state: jax.Array,
    before: jax.Array,
    leaves: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Read a sequence; the states are those that :func:`read_chunks` says."""
    length, taps = tokens.mixed.shape[1], config.delta_conv
    whole = jnp.concatenate([before, tokens.mixed], axis=1)
    kernel = _kernel(w)
    mixed = sum(
        kernel[:, taps - 1 - back]
        * jnp.where(
            tokens.age[..., None] >= back,
            whole[:, taps - 1 - back :][:, :length],
            0,
        )
        for back in range(taps)
    ).astype(whole.dtype)
    x = _inputs(config, tokens._replace(mixed=mixed))
    out, after = read_chunks(x, state, leaves)
    back = jnp.arange(taps - 1)[::-1]
    if leaves is None:  # nothing of a segment before the last one
        own = tokens.age[:, -1:] >= back
        return out, after, jnp.where(own[..., None], whole[:, length:], 0)
    rows = jnp.arange(len(whole))[:, None, None]
    at = leaves[..., None] + jnp.arange(taps - 1)
    return out, after, whole[rows, at]


def _read_branches(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    tokens: _Tokens,
    state: jax.Array,
    before: jax.Array,
) -> jax.Array:
    """Read branches, one after the other, from the states that they leave."""
    rows, count = state.shape[:2]
    # No token of a branch begins a segment.
    tokens = tokens._replace(age=jnp.full_like(tokens.age, config.delta_conv))
    tokens = jax.tree.map(
        lambda x: x.reshape(rows * count, -1, *x.shape[2:]), tokens
    )
    state, before = (
        x.reshape(rows * count, *x.shape[2:]) for x in (state, before)
    )
    out, _, _ = _read_row(config, w, tokens, state, before)
    return out.reshape(rows, -1, *out.shape[2:])


def _kernel(w: dict[str, jax.Array]) -> jax.Array:
    """Return the convolution's [C, taps]: it is summed in float32.

    So that a token is the same read in a row and decoded.
    """
    return w["delta_conv"][:, 0].astype(jnp.float32)


def _inputs(config: DecoderConfig, tokens: _Tokens) -> Inputs:
    """Make the inputs of the delta rule of what the convolution makes."""
    heads, k = config.delta_key_heads, config.delta_key_dim
    mixed = ACTIVATIONS[config.activation](tokens.mixed)
    query, key, value = (
        x.reshape(*x.shape[:2], -1, size).astype(jnp.float32)
        for x, size in zip(
            jnp.split(mixed, [heads * k, 2 * heads * k], axis=-1),
            (k, k, config.delta_value_dim),
            strict=True,
        )
    )
    query, key = (
        jnp.repeat(_unit(x), config.delta_value_heads // heads, axis=2)
        for x in (query, key)
    )
    arrays = (
        constrain(x, "batch", None, "activation_heads", *(None,) * (x.ndim - 3))
        for x in (
            query * k**-0.5, key, value, tokens.log_decay, tokens.rate,
        )
    )  # fmt: skip
    return Inputs(*arrays, tokens.age)


def _unit(x: jax.Array) -> jax.Array:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6)
