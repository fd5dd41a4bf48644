"""On-policy rollouts: prefill, then one token a step until every row ends.

Prompts are padded on the left, so step t writes column P + t of the cache in
every row: one slice, in place. Everything about a rollout is static except the
model, the prompts, the key, the temperature and top-p. Ours, after the
interface of the peers' samplers.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import Written, causal_spans
from topd_jax.models.decoder import mask_for, unembed
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.collectives import to_products
from topd_jax.parallel.sharding import DECODING, constrain, respread, using
from topd_jax.sampling.layerwise import add_columns, repeat_rows, take_apart
from topd_jax.sampling.prompts import bucket, pad_prompts
from topd_jax.sampling.sampler import (
    check_ids,
    check_sampler,
    check_vocab_size,
    choose,
    is_end,
    row_noise,
    spread_draws,
    switch_off,
)
from topd_jax.types import Prompts, Trajectories, positions_of

# Attention over fewer columns than this is not what a step spends time on.
_SHORTEST_STRETCH = 64


def rollout(
    model: LanguageModel,
    prompts: Prompts,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    top_k: int = 0,
    samples: int = 1,
    vocab_size: int | None = None,
    buckets: Sequence[int] | None = None,
    sharding: str = "train",
    first_row: int | jax.Array = 0,
) -> Trajectories:
    """Lets a model complete prompts.

    Jitted; also callable inside another jit. The noise of a token depends on
    the key, its row and its step alone: not on the number of rows, on
    ``max_new_tokens`` or on how rows are spread over devices.

    Args:
      model: any model; its compute dtype is the sampler's.
      prompts: B prompts, padded on the left. They are padded further, to the
        next of ``buckets``, so that nearby lengths share one compilation.
      key: PRNG key; the same key gives the same rollout.
      max_new_tokens: T.
      eos_ids: tokens that end a row; () never ends.
      pad_id: put after the end; may be one of ``eos_ids``.
      temperature: 0 is greedy; a new value does not recompile.
      top_p: 1.0 is off; between other values nothing recompiles.
      top_k: 0 is off.
      samples: completions of each prompt, in consecutive rows.
      vocab_size: ids from here on are never drawn; None allows all.
      buckets: see :func:`bucket`; () keeps the prompts' own width.
      sharding: name of :data:`~topd_jax.parallel.sharding.DECODING`: where
      parameters
        and rows are meanwhile, on a mesh. Trajectories are spread by rows.
      first_row: of a larger batch, in completions: these prompts are a slice
        of it and draw as they would there; a new value does not recompile.

    Returns:
      Trajectories of ``B * samples`` rows; P is the bucket.

    Raises:
      ValueError: for settings that mean nothing.
    """
    if sharding not in DECODING:
        raise ValueError(
            f"sharding={sharding!r} must be one of {', '.join(DECODING)}"
        )
    ids = check_vocab_size(model.head.shape[0], vocab_size)
    check_sampler(temperature, top_p, top_k, ids)
    eos_ids = check_ids(eos_ids, pad_id, model.head.shape[0])
    _check(prompts, max_new_tokens=max_new_tokens, samples=samples)
    return _rollout(
        model,
        _bucketed(prompts, buckets, pad_id),
        key,
        jnp.asarray(temperature, jnp.float32),
        switch_off(top_p),
        jnp.asarray(first_row, jnp.uint32),
        max_new_tokens=int(max_new_tokens),
        eos_ids=eos_ids,
        pad_id=int(pad_id),
        top_k=top_k,
        samples=int(samples),
        vocab_size=ids,
        sharding=sharding,
    )


class _Written(NamedTuple):
    """State of the loop: what is written so far, and what to read next."""

    step: jax.Array  # i32[] tokens written in each row that goes on
    last: jax.Array  # i32[B] the newest token
    done: jax.Array  # bool[B]
    length: jax.Array  # i32[B] tokens, the end included
    tokens: jax.Array  # i32[B, T]
    logp: jax.Array  # f32[B, T]


@functools.partial(
    jax.jit,
    static_argnames=(
        "max_new_tokens", "eos_ids", "pad_id", "top_k", "samples", "vocab_size",
        "sharding",
    ),
)  # fmt: skip
def _rollout(
    model: Any,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    first_row: jax.Array,
    *,
    sharding: str,
    **options: Any,
) -> Trajectories:
    # A static argument, since a trace is kept for the rules it was made under.
    rules = DECODING[sharding]
    if sharding != "train":
        model = respread(model, model.logical_axes, rules)
    with using(rules):
        written = _write(
            model, prompts, key, temperature, top_p, first_row, **options
        )
    return jax.tree.map(
        lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), written
    )


def _write(
    model: Any,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    first_row: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    top_k: int,
    samples: int,
    vocab_size: int,
) -> Trajectories:
    hidden, cache = _prefill(model, prompts, samples)
    prompts = jax.tree.map(lambda x: _repeat(x, samples), prompts)
    rows, width = prompts.tokens.shape
    noise = row_noise(key, rows, (max_new_tokens, 2), first_row)
    first = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    head = model.head[:vocab_size]
    reader, cache = take_apart(model, cache)

    def write(state: _Written, hidden: jax.Array) -> _Written:
        drawn = jax.lax.dynamic_index_in_dim(noise, state.step, 1, False)
        logits = unembed(head, to_products(hidden, "activation_embed"))
        logits = spread_draws(logits)
        token, logp = choose(drawn, logits, temperature, top_p, top_k)
        return _append(state, token, logp, eos_ids, pad_id)

    def stretch(start: Any, begin: int, end: int) -> tuple[_Written, Any]:
        exists = jnp.pad(prompts.mask, ((0, 0), (0, end)), constant_values=True)
        usual = width + (begin + end) // 2  # of all steps of the loop

        def more(carry: tuple[_Written, Any]) -> jax.Array:
            return (carry[0].step < end) & ~jnp.all(carry[0].done)

        def body(carry: tuple[_Written, Any]) -> tuple[_Written, Any]:
            state, cache = carry
            mask = Written(exists, width + state.step, usual)
            hidden, cache = reader(
                state.last[:, None],
                (first + state.step - 1)[:, None],
                mask_for(model, mask),
                cache,
            )
            return write(state, hidden[:, 0]), cache

        return jax.lax.while_loop(more, body, start)

    state = write(_nothing(rows, max_new_tokens, pad_id), hidden)
    begin = 0
    for end in _stretches(max_new_tokens):
        cache = add_columns(model, cache, end - begin)
        state, cache = stretch((state, cache), begin, end)
        begin = end
    mask = jnp.arange(max_new_tokens) < state.length[:, None]
    return Trajectories(
        prompts.tokens, prompts.mask, state.tokens, mask, state.logp,
        truncated=~state.done,
    )  # fmt: skip


def _nothing(rows: int, length: int, pad_id: int) -> _Written:
    spread = functools.partial(jnp.full, (rows,))
    grid = functools.partial(jnp.full, (rows, length))
    return _Written(
        step=jnp.zeros((), jnp.int32),
        last=constrain(spread(pad_id, jnp.int32), "batch"),
        done=constrain(spread(False), "batch"),
        length=constrain(spread(0), "batch"),
        tokens=constrain(grid(pad_id, jnp.int32), "batch", None),
        logp=constrain(grid(0.0, jnp.float32), "batch", None),
    )


def _append(
    state: _Written,
    token: jax.Array,
    logp: jax.Array,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> _Written:
    token = jnp.where(state.done, pad_id, token)
    logp = jnp.where(state.done, 0.0, logp)
    at = (0, state.step)
    return _Written(
        step=state.step + 1,
        last=token,
        # The pad id may be an end: rows that are done stay as they are.
        done=state.done | is_end(token, eos_ids),
        length=state.length + ~state.done,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
        logp=jax.lax.dynamic_update_slice(state.logp, logp[:, None], at),
    )


def _prefill(
    model: Any, prompts: Prompts, samples: int
) -> tuple[jax.Array, Any]:
    """Last states [B * samples, D], and the cache of all prompt columns.

    Each prompt is read once; then its part of the cache is repeated.
    """
    hidden, cache = model(
        prompts.tokens,
        positions_of(prompts.mask),
        mask_for(model, causal_spans(prompts.mask)),
        model.init_cache(*prompts.tokens.shape),
    )
    return _repeat(hidden[:, -1], samples), repeat_rows(model, cache, samples)


def _repeat(x: jax.Array, times: int) -> jax.Array:
    return x if times == 1 else jnp.repeat(x, times, axis=0)


def _stretches(length: int) -> list[int]:
    """Where the cache grows: T, and its half, quarter, eighth if 64 or more.

    A step costs as many columns as the cache has, not as many as are written:
    rows that end early never pay for the limit. Each stretch is a loop to
    compile, hence the few.
    """
    ends = [-(-length // part) for part in (8, 4, 2)]
    return [end for end in ends if end >= _SHORTEST_STRETCH] + [length]


def _bucketed(
    prompts: Prompts, buckets: Sequence[int] | None, pad_id: int
) -> Prompts:
    if buckets is not None and not len(buckets):
        return prompts
    width = bucket(prompts.tokens.shape[1], buckets)
    return pad_prompts(prompts, width, pad_id)


def _check(prompts: Prompts, **counts: int) -> None:
    for name, value in counts.items():
        if operator.index(value) < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tokens, mask = jnp.shape(prompts.tokens), jnp.shape(prompts.mask)
    if len(tokens) != 2 or tokens != mask or 0 in tokens:
        raise ValueError(
            f"prompts.tokens {tokens} and prompts.mask {mask} must have one "
            "shape [B, P] with B, P >= 1; a single prompt has B=1"
        )
