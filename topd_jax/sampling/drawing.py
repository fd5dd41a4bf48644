"""One step of a loop that draws tokens, and what the loop carries."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.decoder import unembed
from topd_jax.parallel.collectives import to_products
from topd_jax.parallel.sharding import constrain, constrain_rows
from topd_jax.sampling.samplers import choose
from topd_jax.types import Head


class Drawn(NamedTuple):
    """The tokens drawn so far; T is the limit.

    Attributes:
      step: i32[] tokens of each sequence that has not ended.
      last: i32[B, ...] the newest token.
      done: bool[B, ...] sequences that have ended.
      length: i32[B, ...] tokens, the end included.
      tokens: i32[B, ..., T].
      logp: f32[B, ..., T].
      states: [B, ..., T, D] the states that the tokens were drawn from, or
        None.
    """

    step: jax.Array
    last: jax.Array
    done: jax.Array
    length: jax.Array
    tokens: jax.Array
    logp: jax.Array
    states: jax.Array | None

    @property
    def mask(self) -> jax.Array:
        """bool[B, ..., T]: which tokens exist."""
        return jnp.arange(self.tokens.shape[-1]) < self.length[..., None]


def nothing_drawn(
    done: jax.Array,
    length: int,
    pad_id: int,
    states: jax.Array | None = None,
) -> Drawn:
    """Return what the loop starts from.

    Args:
      done: bool[B, ...] sequences that draw nothing.
      length: T.
      pad_id: put where no token is.
      states: [..., D] like the states to record; None records none.
    """

    def full(shape: tuple, value: int, dtype: jnp.dtype) -> jax.Array:
        return constrain_rows(jnp.full(shape, value, dtype))

    shape, grid = done.shape, (*done.shape, length)
    if states is not None:
        states = full((*grid, states.shape[-1]), 0, states.dtype)
    return Drawn(
        step=jnp.zeros((), jnp.int32),
        last=full(shape, pad_id, jnp.int32),
        done=constrain_rows(done),
        length=full(shape, 0, jnp.int32),
        tokens=full(grid, pad_id, jnp.int32),
        logp=full(grid, 0, jnp.float32),
        states=states,
    )


def draw_token(
    drawn: Drawn,
    hidden: jax.Array,
    *,
    head: Head,
    noise: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None = None,
    top_k: int = 0,
    eos_ids: tuple[int, ...],
    pad_id: int,
    limits: jax.Array | None = None,
) -> Drawn:
    """Draw the next token of every sequence that has not ended.

    Args:
      drawn: so far.
      hidden: [B, ..., D] the newest states.
      head: [V, D] rows that may be drawn.
      noise: f32[B, T, ..., 2] uniform in [0, 1), of all steps.
      temperature: f32[]; 0 is greedy.
      top_p: f32[]; None turns it off.
      top_k: 0 turns it off.
      eos_ids: tokens that end a sequence.
      pad_id: put after the end.
      limits: i32[B, ...] tokens of each sequence at the most; None is T.

    Returns:
      With one token more.
    """
    uniform = jax.lax.dynamic_index_in_dim(noise, drawn.step, 1, False)
    token, logp = next_token(hidden, uniform, head, temperature, top_p, top_k)
    token = jnp.where(drawn.done, pad_id, token)
    ended = is_end(token, eos_ids)
    if limits is not None:
        ended |= drawn.step + 1 >= limits
    put = functools.partial(
        jax.lax.dynamic_update_index_in_dim, index=drawn.step, axis=token.ndim
    )
    states = drawn.states
    if states is not None:
        states = put(states, jnp.where(drawn.done[..., None], 0, hidden))
    return Drawn(
        step=drawn.step + 1,
        last=token,
        # The pad id may be an end: sequences that are done stay as they are.
        done=drawn.done | ended,
        length=drawn.length + ~drawn.done,
        tokens=put(drawn.tokens, token),
        logp=put(drawn.logp, jnp.where(drawn.done, 0.0, logp)),
        states=states,
    )


def next_token(
    hidden: jax.Array,
    uniform: jax.Array,
    head: Head,
    temperature: jax.Array,
    top_p: jax.Array | None,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Draw a token of every sequence.

    Args:
      hidden: [B, ..., D] the newest states.
      uniform: f32[B, ..., 2] in [0, 1).
      head: [V, D] rows that may be drawn.
      temperature: f32[]; 0 is greedy.
      top_p: f32[]; None turns it off.
      top_k: 0 turns it off.

    Returns:
      (tokens i32[B, ...], logp f32[B, ...]).
    """
    inner = (None,) * (hidden.ndim - 2)
    logits = unembed(head, to_products(hidden, *inner, "activation_embed"))
    # Logits are computed where the head's rows are and drawn from where each
    # row is whole. Told the second alone, the compiler gathers the head at
    # every token.
    logits = constrain(logits, "product_batch", *inner, "vocab")
    logits = constrain(logits, "draws", *inner, None)
    return choose(uniform, logits, temperature, top_p, top_k)


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Return bool[...]: which tokens end a sequence."""
    ends = jnp.array(eos_ids, tokens.dtype)
    return jnp.any(tokens[..., None] == ends, axis=-1)
