"""On-policy rollouts: prefill, then one token per step until every row ends.

Prompts are padded on the left, so step t writes column P + t of the cache in
every row: one slice, in place. Everything about a rollout is static except the
model, the prompts, the key, the temperature and top-p. The paper samples with
an inference engine; the interface here follows those.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import CachedMask, causal_intervals
from topd_jax.models.decoder import mask_for
from topd_jax.models.layerwise import unstack
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.rules import decoding_rules, using
from topd_jax.parallel.sharding import constrain_rows, reshard
from topd_jax.sampling.caches import add_columns, repeat_rows, stretches
from topd_jax.sampling.checks import (
    check_ends,
    check_ids,
    check_limits,
    check_prompt_values,
    check_prompts,
    check_vocab_size,
)
from topd_jax.sampling.drawing import (
    Drawn,
    draw_token,
    is_end,
    next_token,
    nothing_drawn,
)
from topd_jax.sampling.samplers import check_sampler, row_noise
from topd_jax.sampling.slots import write_in_slots
from topd_jax.types import Prompts, Trajectories, positions_of


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
    sharding: str = "train",
    slots: int = 0,
    limits: Sequence[int] | jax.Array | None = None,
) -> Trajectories:
    """Let a model complete prompts.

    Jitted; also callable inside another jit. The noise of a token depends on
    the key, its row and its step alone: not on the number of rows, on
    ``max_new_tokens`` or on how rows are spread over devices.

    Args:
      model: any model; its compute dtype is the sampler's.
      prompts: B prompts of P columns, padded on the left.
      key: PRNG key; the same key gives the same rollout.
      max_new_tokens: T, at least 1.
      eos_ids: tokens that end a row; () never ends.
      pad_id: put after the end; may be one of ``eos_ids``.
      temperature: 0 (greedy) to 1000; a new value does not recompile.
      top_p: above 0, at most 1 (off); between other values nothing
        recompiles.
      top_k: 0 is off.
      samples: completions of each prompt, in consecutive rows.
      vocab_size: ids from here on are never drawn; None allows all.
      sharding: where parameters and rows are meanwhile, on a mesh, of
        :data:`~topd_jax.parallel.rules.DECODING`. Trajectories are spread by
        rows.
      slots: rows that are held at once where there are more: the next one
        begins where one has ended. The tokens are the same; the cache is of
        so many rows. 0 holds all.
      limits: i32[B * samples] tokens of each row at the most, at least 1;
        None, and more than T, are T.

    Returns:
      Trajectories of ``B * samples`` rows.

    Raises:
      ValueError: for settings or prompts that mean nothing.
    """
    decoding_rules(sharding)
    ids = check_vocab_size(model.head.shape[0], vocab_size)
    counts = dict(max_new_tokens=max_new_tokens, samples=samples)
    if slots:
        counts["slots"] = slots
    check_sampler(temperature, top_p, top_k, vocab_size=ids, **counts)
    eos_ids = check_ids(eos_ids, pad_id, model.head.shape[0])
    check_ends(eos_ids, ids)
    check_prompts(prompts)
    limits = check_limits(limits, prompts.tokens.shape[0] * int(samples))
    return _rollout(
        model,
        prompts,
        key,
        jnp.asarray(temperature, jnp.float32),
        # The filter is not compiled for a Python 1.0.
        None if isinstance(top_p, int | float) and top_p >= 1 else top_p,
        limits,
        max_new_tokens=int(max_new_tokens),
        eos_ids=eos_ids,
        pad_id=int(pad_id),
        top_k=top_k,
        samples=int(samples),
        vocab_size=ids,
        sharding=sharding,
        slots=int(slots),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "max_new_tokens", "eos_ids", "pad_id", "top_k", "samples", "vocab_size",
        "sharding", "slots",
    ),
)  # fmt: skip
def _rollout(
    model: Any,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    limits: jax.Array | None,
    *,
    sharding: str,
    **options: Any,
) -> Trajectories:
    check_prompt_values(prompts, model.head.shape[0])
    prompts = prompts.replace(tokens=prompts.tokens.astype(jnp.int32))
    with using(decoding_rules(sharding)):
        if sharding != "train":
            model = reshard(model, model.logical_axes)
        out = _write(model, prompts, key, temperature, top_p, limits, **options)
    return constrain_rows(out)


def _write(
    model: Any,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    limits: jax.Array | None,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    top_k: int,
    samples: int,
    vocab_size: int,
    slots: int,
) -> Trajectories:
    head = model.head[:vocab_size]
    told = dict(eos_ids=eos_ids, pad_id=pad_id, limits=limits)
    filters = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    repeated = jax.tree.map(lambda x: _repeat(x, samples), prompts)
    rows = repeated.tokens.shape[0]
    if 0 < slots < rows:
        drawn = write_in_slots(
            model, repeated, key,
            functools.partial(next_token, head=head, **filters),
            slots=slots, length=max_new_tokens, **told,
        )  # fmt: skip
    else:
        noise = row_noise(key, jnp.arange(rows), (max_new_tokens, 2))
        draw_next = functools.partial(
            draw_token, head=head, noise=noise, **filters, **told
        )
        drawn = nothing_drawn(jnp.zeros(rows, bool), max_new_tokens, pad_id)
        drawn = _write_all(model, prompts, samples, drawn, draw_next)
    mask = jnp.arange(max_new_tokens) < drawn.length[:, None]
    ended = jnp.any(is_end(drawn.tokens, eos_ids) & mask, axis=1)
    return Trajectories(
        repeated.tokens, repeated.mask, drawn.tokens, mask, drawn.logp,
        truncated=~ended, teacher_prompt=repeated.teacher,
    )  # fmt: skip


def _write_all(
    model: Any,
    prompts: Prompts,
    samples: int,
    drawn: Drawn,
    draw_next: Callable[[Drawn, jax.Array], Drawn],
) -> Drawn:
    """Let all rows write side by side, until the longest has ended."""
    width, length = prompts.tokens.shape[1], drawn.tokens.shape[1]
    model = unstack(model, width + length)
    # Each prompt is read once; then its part of the cache is repeated.
    hidden, cache = model(
        prompts.tokens,
        positions_of(prompts.mask),
        mask_for(model, causal_intervals(prompts.mask)),
        model.init_cache(*prompts.tokens.shape),
    )
    cache = repeat_rows(model, cache, samples)
    prompts = jax.tree.map(lambda x: _repeat(x, samples), prompts)
    first = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)

    def stretch(carry: Any, begin: int, end: int) -> tuple[Drawn, Any]:
        exists = jnp.pad(prompts.mask, ((0, 0), (0, end)), constant_values=True)
        usual = width + (begin + end) // 2  # of all steps of the loop

        def more(carry: tuple[Drawn, Any]) -> jax.Array:
            return (carry[0].step < end) & ~jnp.all(carry[0].done)

        def body(carry: tuple[Drawn, Any]) -> tuple[Drawn, Any]:
            drawn, cache = carry
            mask = CachedMask(exists, width + drawn.step, usual)
            hidden, cache = model(
                drawn.last[:, None],
                (first + drawn.step - 1)[:, None],
                mask_for(model, mask),
                cache,
            )
            return draw_next(drawn, hidden[:, 0]), cache

        return jax.lax.while_loop(more, body, carry)

    drawn, begin = draw_next(drawn, _repeat(hidden[:, -1], samples)), 0
    for end in stretches(length):
        cache = add_columns(model, cache, end - begin)
        drawn, cache = stretch((drawn, cache), begin, end)
        begin = end
    return drawn


def _repeat(x: jax.Array, times: int) -> jax.Array:
    return x if times == 1 else jnp.repeat(x, times, axis=0)
