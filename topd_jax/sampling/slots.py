"""Rollouts that hold fewer rows than they write: a row that ends makes room.

A fixed batch takes as many steps as its longest row. Here the loop holds
``slots`` rows; where one has ended, the next prompt is read into its slot
(continuous batching: Yu et al., Orca, OSDI 2022), all in one program.

Every step writes one column of the cache, the same in all slots: the cursor. A
prompt goes into the columns before it. So a row is a run of columns up to the
cursor, and its mask is where it begins. Columns that no row needs any more are
dropped: where the others are few, the loop runs on a copy of these alone, since
a step costs as many columns as its cache has; where the cache ends, they move
to the left.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import CachedMask, causal_intervals
from topd_jax.models.decoder import mask_for
from topd_jax.models.layerwise import unstack
from topd_jax.parallel.collectives import row_parts
from topd_jax.parallel.sharding import constrain
from topd_jax.sampling.caches import stretches
from topd_jax.sampling.drawing import is_end
from topd_jax.sampling.samplers import row_noise
from topd_jax.sampling.slot_cache import (
    add_tokens,
    cut_columns,
    paste_columns,
    put_rows,
)
from topd_jax.types import Prompts, positions_of

# Slots are refilled once this part of them is empty, as many at a time: a
# prompt is not read alone where there are many.
_EMPTY = 16
# Columns that are free after columns have been dropped, as a part of the cache.
_BEHIND = 8


class Written(NamedTuple):
    """What was written.

    Attributes:
      tokens: i32[R, T].
      logp: f32[R, T].
      length: i32[R] tokens of each row.
      steps: i32[] of the loop.
    """

    tokens: jax.Array
    logp: jax.Array
    length: jax.Array
    steps: jax.Array


class _State(NamedTuple):
    """What the loop carries; of S slots, R rows.

    Attributes:
      row: i32[S] row in each slot; R in an empty one.
      step: i32[S] tokens of it.
      first: i32[S] column of its first token.
      begun: i32[] rows that have begun.
      cursor: i32[] column that is written next.
      cache: of the slots.
      hidden: [S, D] newest states.
      noise: f32[S, T, 2] uniform in [0, 1), of all steps of the row.
      written: so far.
    """

    row: jax.Array
    step: jax.Array
    first: jax.Array
    begun: jax.Array
    cursor: jax.Array
    cache: Any
    hidden: jax.Array
    noise: jax.Array
    written: Written


def write_in_slots(
    model: Any,
    prompts: Prompts,
    key: jax.Array,
    draw: Callable[..., tuple[jax.Array, jax.Array]],
    *,
    slots: int,
    length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    limits: jax.Array | None = None,
) -> Written:
    """Complete prompts, ``slots`` rows at a time.

    Args:
      model: any model. Integer scalars of its cache count tokens.
      prompts: R rows of P columns.
      key: PRNG key.
      draw: (hidden [S, D], uniform f32[S, 2]) -> (tokens i32[S], logp f32[S]).
      slots: S, rows that are held at once.
      length: T.
      eos_ids: tokens that end a row.
      pad_id: put after the end.
      limits: i32[R] tokens of each row at the most; None, and more than T, are
        T.

    Returns:
      What was written.
    """
    rows, width = prompts.tokens.shape
    columns = width + length + max(length // _BEHIND, 1)
    model = unstack(model, width + length)
    cache = model.init_cache(slots, columns)
    # Any row may go to any device.
    prompts = jax.tree.map(lambda x: constrain(x, None, None), prompts)
    loop = _Loop(
        model, prompts, key, draw, slots, length, columns, eos_ids,
        jnp.full(rows, length) if limits is None
        else jnp.minimum(limits, length),
    )  # fmt: skip
    zeros = jnp.zeros(slots, jnp.int32)
    like, *_ = jax.eval_shape(loop.read_prompts, zeros)
    state = _State(
        row=jnp.full(slots, rows, jnp.int32),
        step=zeros,
        first=zeros,
        begun=jnp.zeros((), jnp.int32),
        cursor=jnp.asarray(width, jnp.int32),
        cache=add_tokens(cache, width),
        hidden=constrain(jnp.zeros(like.shape, like.dtype), "batch", None),
        noise=constrain(jnp.zeros((slots, length, 2)), "batch", None, None),
        written=Written(
            jnp.full((rows, length), pad_id, jnp.int32),
            jnp.zeros((rows, length), jnp.float32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((), jnp.int32),
        ),
    )
    return jax.lax.while_loop(loop.goes_on, loop.turn, state).written


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop over steps, and what it does not change.

    Its parts are loops too, some of no or of one turn: what a loop carries is
    written in place, what a condition returns may be copied.
    """

    model: Any
    prompts: Prompts
    key: jax.Array
    draw: Callable[..., tuple[jax.Array, jax.Array]]
    slots: int
    length: int
    columns: int
    eos_ids: tuple[int, ...]
    limits: jax.Array

    @property
    def rows(self) -> int:
        """R."""
        return self.prompts.tokens.shape[0]

    @property
    def width(self) -> int:
        """P."""
        return self.prompts.tokens.shape[1]

    @property
    def enough(self) -> int:
        """Slots that have to be empty to be refilled."""
        return max(self.slots // _EMPTY, 1)

    @property
    def widths(self) -> list[int]:
        """Columns of the caches that are narrower than all."""
        ends = stretches(self.length)[:-1]
        widths = [(self.width + n) * _BEHIND // (_BEHIND - 1) for n in ends]
        # Where prompts are far longer than completions, hardly one is.
        return [width for width in widths if width < self.columns]

    def goes_on(self, s: _State) -> jax.Array:
        """Tell whether a row is left to begin or to end."""
        return (s.begun < self.rows) | jnp.any(s.row < self.rows)

    def turn(self, s: _State) -> _State:
        """Refill slots, then step until so many have ended again."""
        s = jax.lax.while_loop(self.is_wanting, self.refill, s)
        for width in self.widths:
            s = jax.lax.while_loop(
                functools.partial(self.fits, width),
                functools.partial(self.run_in, width),
                s,
            )
        s = jax.lax.while_loop(
            lambda s: s.cursor == self.columns, self.drop_columns, s
        )
        return self.run(s, self.columns)

    def empty(self, s: _State) -> jax.Array:
        """Count the empty slots."""
        return jnp.sum(s.row == self.rows)

    def is_wanting(self, s: _State) -> jax.Array:
        """Tell whether enough slots are empty, and a row is left for one."""
        return (self.empty(s) >= self.enough) & (s.begun < self.rows)

    def needless(self, s: _State) -> jax.Array:
        """Count the columns before those that rows and a prompt need."""
        return jnp.minimum(jnp.min(s.first), s.cursor - self.width)

    def fits(self, width: int, s: _State) -> jax.Array:
        """Tell whether a run on a copy of so many columns is worth it."""
        needed = s.cursor - self.needless(s)
        return (needed + width // _BEHIND <= width) & self.lasts(s)

    def lasts(self, s: _State) -> jax.Array:
        """Tell whether a row is not at its end, and no other shall begin."""
        return (self.empty(s) < self.slots) & ~self.is_wanting(s)

    def run_in(self, width: int, s: _State) -> _State:
        """Step on a copy of the columns that rows need."""
        start = jnp.minimum(self.needless(s), self.columns - width)
        return self.paste(s, self.run(self.cut(s, start, width), width))

    def run(self, s: _State, columns: int) -> _State:
        """Step until enough rows have ended, or the cache has."""
        most = self.empty(s) + self.enough
        return jax.lax.while_loop(
            lambda s: (
                self.lasts(s) & (self.empty(s) < most) & (s.cursor < columns)
            ),
            functools.partial(self.step, columns),
            s,
        )

    def step(self, columns: int, s: _State) -> _State:
        """Draw a token in every slot, then read it."""
        noise = constrain(s.noise, "batch", None, None)
        uniform = jnp.take_along_axis(noise, s.step[:, None, None], axis=1)
        drawn = self.draw(s.hidden, constrain(uniform[:, 0], "batch", None))
        token, logp = (constrain(x, None) for x in drawn)  # known everywhere
        step = s.step + 1
        written = Written(
            s.written.tokens.at[s.row, s.step].set(token, mode="drop"),
            s.written.logp.at[s.row, s.step].set(logp, mode="drop"),
            s.written.length.at[s.row].set(step, mode="drop"),
            s.written.steps + 1,
        )
        limit = self.limits.at[s.row].get(mode="fill", fill_value=0)
        done = is_end(token, self.eos_ids) | (step >= limit)
        row = jnp.where(done, self.rows, s.row)
        # An empty slot attends to itself alone.
        first = jnp.where(row == self.rows, s.cursor, s.first)
        exists = jnp.arange(columns) >= first[:, None]
        usual = min(self.width + self.length // 2, columns)
        hidden, cache = self.model(
            token[:, None],
            (s.cursor - first)[:, None],
            mask_for(self.model, CachedMask(exists, s.cursor + 1, usual)),
            s.cache,
        )
        return s._replace(
            row=row, step=jnp.where(row == self.rows, 0, step), first=first,
            cursor=s.cursor + 1, cache=cache, hidden=hidden[:, 0],
            written=written,
        )  # fmt: skip

    def refill(self, s: _State) -> _State:
        """Read the next prompts into empty slots, some on every device."""
        _, parts = row_parts(self.slots)
        empty = (s.row == self.rows).reshape(parts, -1)
        each = empty.shape[1]
        count = max(each // _EMPTY, 1)
        local = jnp.argsort(~empty, axis=1, stable=True)[:, :count]
        free = jnp.take_along_axis(empty, local, axis=1).reshape(-1)
        row = s.begun + jnp.cumsum(free, dtype=jnp.int32) - 1
        free &= row < self.rows
        row = jnp.where(free, row, self.rows)
        source = jnp.minimum(row, self.rows - 1)
        hidden, cache, lengths = self.read_prompts(source)
        noise = row_noise(self.key, source, (self.length, 2))
        local = local.reshape(-1).astype(jnp.int32)
        cache, hidden, noise = put_rows(
            self.model,
            (s.cache, s.hidden, s.noise),
            (cache, hidden, noise),
            jnp.where(free, local, -1),
            s.cursor - self.width,
        )
        slot = local + jnp.repeat(jnp.arange(parts) * each, count)
        slot = jnp.where(free, slot, self.slots)
        return s._replace(
            row=s.row.at[slot].set(row, mode="drop"),
            first=s.first.at[slot].set(s.cursor - lengths, mode="drop"),
            begun=s.begun + jnp.sum(free, dtype=jnp.int32),
            cache=cache, hidden=hidden, noise=noise,
        )  # fmt: skip

    def read_prompts(self, rows: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        """Return last states, the cache, and the tokens of rows i32[G]."""
        tokens, mask = (
            constrain(x[rows], "batch", None)
            for x in (self.prompts.tokens, self.prompts.mask)
        )
        hidden, cache = self.model(
            tokens,
            positions_of(mask),
            mask_for(self.model, causal_intervals(mask)),
            self.model.init_cache(*tokens.shape),
        )
        return hidden[:, -1], cache, jnp.sum(mask, axis=1, dtype=jnp.int32)

    def drop_columns(self, s: _State) -> _State:
        """Move the columns that rows may need to the left."""
        kept = self.width + self.length
        return self.paste(s, self.cut(s, self.columns - kept, kept))

    def cut(self, s: _State, start: jax.Array | int, size: int) -> _State:
        """Take the columns from ``start`` on alone."""
        return s._replace(
            first=s.first - start,
            cursor=s.cursor - start,
            cache=cut_columns(self.model, s.cache, start, size),
        )

    def paste(self, s: _State, part: _State) -> _State:
        """Put the columns of :meth:`cut` to the beginning of the cache."""
        cache = paste_columns(self.model, s.cache, part.cache)
        return part._replace(cache=cache)
