"""The model continues many prefixes of every row at once, on one cache.

The teacher has read the whole rollout; its cache therefore already holds every
prefix y_{<t}. Its own continuations from M candidate positions are written
*behind* the rollout, M columns a step: the token i of branch m sees the columns
before y_t and the columns of branch m, and is compared with no others. No
prefix is copied: K - 1 steps of M queries a row are all that the teacher
windows of arXiv:2606.00305, §3 cost. How they are computed is ours.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import Branching
from topd_jax.models.decoder import in_compute_dtype, mask_for, unembed
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.collectives import to_products
from topd_jax.parallel.sharding import DECODING, constrain, respread, using
from topd_jax.sampling.layerwise import take_apart
from topd_jax.sampling.sampler import (
    check_ids,
    check_sampler,
    check_vocab_size,
    choose,
    is_end,
    row_noise,
    spread_draws,
)
from topd_jax.types import Candidates, Trajectories, Windows


def branch_columns(count: int, length: int) -> int:
    """Cache columns that branches need behind the rollout's own.

    Args:
      count: M, branches a row.
      length: K, tokens of each; the last one is never read.

    Returns:
      ``M * (K - 1)``.
    """
    return count * (length - 1)


def branch(
    model: LanguageModel,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    *,
    length: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float | jax.Array = 0.0,
    key: jax.Array | None = None,
    vocab_size: int | None = None,
    return_hidden: bool = False,
    first_row: int | jax.Array = 0,
    sharding: str = "train",
) -> Windows | tuple[Windows, jax.Array]:
    """Continues every candidate's prefix y_{<t}: the windows T_t of §3.

    Args:
      model: the model that has read the trajectories.
      cache: of that reading, made by ``model.init_cache(B, L +
        branch_columns(M, K))``, with ``L`` columns written.
      hidden: [B, T, D] its final states in completion coordinates; entry t
        predicts the first token of branch t, without another forward pass.
      trajectories: what was read.
      candidates: positions [B, M] to branch off.
      length: K.
      eos_ids: tokens that end a window.
      pad_id: put after the end and in slots that are not used.
      temperature: 0 is greedy.
      key: PRNG key; needed unless greedy.
      vocab_size: ids from here on are never drawn; None allows all.
      return_hidden: also return the states that the tokens were drawn from.
      first_row: of a larger batch, a slice of which draws as it would there.
      sharding: where parameters are meanwhile, on a mesh: "train", as the
        rules in force have them; or "gathered" or "rows" of
        :data:`~topd_jax.parallel.sharding.DECODING`, which leave the cache,
        whose rows
        are spread as :data:`~topd_jax.parallel.sharding.READING` has them,
        where it is.

    Returns:
      Windows [B, M, K]; with ``return_hidden`` also the states [B, M, K, D]:
      entry i predicts token i of the window (0 where the window has ended).

    Raises:
      ValueError: where shapes do not fit, or a key is missing.
    """
    _check_key(key, temperature)
    ids = check_vocab_size(model.head.shape[0], vocab_size)
    check_sampler(temperature)
    eos_ids = check_ids(eos_ids, pad_id, model.head.shape[0])
    _check(model, cache, hidden, trajectories, candidates, length)
    windows, states = _branch(
        model,
        cache,
        hidden,
        trajectories,
        candidates,
        jnp.asarray(temperature, jnp.float32),
        jax.random.key(0) if key is None else key,
        jnp.asarray(first_row, jnp.uint32),
        length=length,
        eos_ids=eos_ids,
        pad_id=int(pad_id),
        vocab_size=ids,
        return_hidden=return_hidden,
        sharding=sharding,
    )
    return (windows, states) if return_hidden else windows


class _Grown(NamedTuple):
    """State of the loop over the tokens of all branches."""

    step: jax.Array  # i32[] tokens written in each branch that goes on
    last: jax.Array  # i32[B, M] the newest token
    done: jax.Array  # bool[B, M]
    length: jax.Array  # i32[B, M]
    tokens: jax.Array  # i32[B, M, K]
    states: jax.Array | None  # [B, M, K, D]


@functools.partial(
    jax.jit,
    static_argnames=(
        "length", "eos_ids", "pad_id", "vocab_size", "return_hidden",
        "sharding",
    ),
)  # fmt: skip
def _branch(
    model: Any, *args: Any, sharding: str, **options: Any
) -> tuple[Windows, jax.Array | None]:
    if sharding == "train":
        return _grow(model, *args, **options)
    # A static argument, since a trace is kept for the rules it was made under.
    rules = DECODING[sharding]
    model = respread(in_compute_dtype(model), model.logical_axes, rules)
    with using(rules):
        grown = _grow(model, *args, **options)
        return jax.tree.map(
            lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), grown
        )


def _grow(
    model: Any,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    temperature: jax.Array,
    key: jax.Array,
    first_row: jax.Array,
    *,
    length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int,
    return_hidden: bool,
) -> tuple[Windows, jax.Array | None]:
    rows, count = candidates.positions.shape
    first = jnp.sum(trajectories.prompt_mask, axis=1, dtype=jnp.int32)
    first = first[:, None] + candidates.positions  # rotary position of y_t
    noise = row_noise(key, rows, (length, count, 2), first_row)
    head = model.head[:vocab_size]
    sight, written_at = _sight(
        trajectories, candidates, branch_columns(count, length)
    )
    reader, cache = take_apart(model, cache)

    def grow(state: _Grown, hidden: jax.Array) -> _Grown:
        drawn = jax.lax.dynamic_index_in_dim(noise, state.step, 1, False)
        logits = unembed(head, to_products(hidden, None, "activation_embed"))
        logits = spread_draws(logits)
        token, _ = choose(drawn, logits, temperature, None, 0)
        return _append(state, token, hidden, eos_ids, pad_id)

    def more(carry: tuple[_Grown, Any]) -> jax.Array:
        state, _ = carry
        return (state.step < length) & ~jnp.all(state.done)

    def body(carry: tuple[_Grown, Any]) -> tuple[_Grown, Any]:
        state, cache = carry
        exists = sight.exists & (written_at < state.step)
        mask = mask_for(model, sight.replace(exists=exists))
        position = first + state.step - 1
        hidden, cache = reader(state.last, position, mask, cache)
        return grow(state, hidden), cache

    start = jnp.take_along_axis(hidden, candidates.positions[..., None], axis=1)
    keep = jnp.zeros((rows, count, length, hidden.shape[-1]), hidden.dtype)
    state = _Grown(
        step=jnp.zeros((), jnp.int32),
        last=jnp.full((rows, count), pad_id, jnp.int32),
        done=constrain(~candidates.mask, "batch", None),
        length=jnp.zeros((rows, count), jnp.int32),
        tokens=jnp.full((rows, count, length), pad_id, jnp.int32),
        states=keep if return_hidden else None,
    )
    state = grow(state, start)
    if length > 1:  # else the cache has no column to write to
        state, _ = jax.lax.while_loop(more, body, (state, cache))
    mask = jnp.arange(length) < state.length[..., None]
    return Windows(state.tokens, mask), state.states


def _append(
    state: _Grown,
    token: jax.Array,
    hidden: jax.Array,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> _Grown:
    token = jnp.where(state.done, pad_id, token)
    put = functools.partial(
        jax.lax.dynamic_update_index_in_dim, index=state.step, axis=2
    )
    states = state.states
    if states is not None:
        states = put(states, jnp.where(state.done[..., None], 0, hidden))
    return _Grown(
        step=state.step + 1,
        last=token,
        done=state.done | is_end(token, eos_ids),
        length=state.length + ~state.done,
        tokens=put(state.tokens, token),
        states=states,
    )


def _sight(
    trajectories: Trajectories, candidates: Candidates, extra: int
) -> tuple[Branching, jax.Array]:
    """What the branches see, and which step writes each column (-1: none).

    Returns:
      (all that they ever see; i32[L + extra]).
    """
    exists = trajectories.sequence_mask
    read, count = exists.shape[1], candidates.positions.shape[1]
    written = jnp.arange(read + extra) - read
    step = jnp.where(written < 0, -1, written // count)
    exists = jnp.pad(exists, ((0, 0), (0, extra)), constant_values=True)
    prefix = candidates.positions + trajectories.prompt.shape[1]
    return Branching(exists, prefix, read), step


def _check_key(key: jax.Array | None, temperature: float | jax.Array) -> None:
    greedy = isinstance(temperature, int | float) and temperature == 0
    if key is None and not greedy:
        raise ValueError(
            f"branch at temperature={temperature} needs a key; pass key=, or "
            "temperature=0.0 for the greedy continuation"
        )


def _check(
    model: Any,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    length: int,
) -> None:
    rows, written = trajectories.tokens.shape
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if hidden.shape[:2] != (rows, written):
        raise ValueError(
            f"hidden {hidden.shape} must be [B={rows}, T={written}, D], in "
            "completion coordinates; see completion_states"
        )
    if candidates.positions.ndim != 2 or candidates.positions.shape[0] != rows:
        raise ValueError(
            f"candidates.positions {candidates.positions.shape} must be "
            f"[B={rows}, M]"
        )
    count = candidates.positions.shape[1]
    columns = trajectories.sequence.shape[1]
    columns += branch_columns(count, length)
    like = jax.eval_shape(lambda: model.init_cache(rows, columns))
    shapes = [x.shape for x in jax.tree.leaves(cache)]
    wanted = [x.shape for x in jax.tree.leaves(like)]
    if shapes != wanted:
        raise ValueError(
            f"the cache has arrays of shape {shapes} and {count} branches of "
            f"{length} tokens need {wanted}; allocate it with model.init_cache"
            f"({rows}, L + branch_columns({count}, {length})), {columns} "
            "columns in all"
        )
