"""Attention masks told by where they begin and end. The paper has none of this.

A mask bool[B, S, L] is 1 GiB a row at 32k tokens. Rollouts, branches and packed
rows need four numbers a token: it attends to a prefix of the keys, whose first
ones a window leaves out, and to an interval that ends with itself. Attention
that reads a block of queries at a time makes the mask of that block alone.
Branches that are being written attend to a prefix, and to keys of their own
that stand apart.
"""

import jax
import jax.numpy as jnp
from flax import struct

from topd_jax.models.attention.cache import update_slice


@struct.dataclass
class IntervalMask:
    """Which keys each token attends to.

    Token s attends to key l where ``exists[l]`` and either
    ``begin[s] <= l < prefix[s]`` or ``first[s] <= l <= last[s]``.

    Attributes:
      exists: bool[B, L] keys that any token may attend to.
      begin: i32[B, S] first key of the prefix that a token attends to.
      prefix: i32[B, S] end of the prefix, exclusive.
      first: i32[B, S] first key of its interval.
      last: i32[B, S] last key of it.
    """

    exists: jax.Array
    begin: jax.Array
    prefix: jax.Array
    first: jax.Array
    last: jax.Array

    def dense(self) -> jax.Array:
        """Return the same as bool[B, S, L]."""
        key = jnp.arange(self.exists.shape[-1])
        inside = self.first[..., None] <= key
        inside &= key <= self.last[..., None]
        prefix = self.begin[..., None] <= key
        prefix &= key < self.prefix[..., None]
        return (prefix | inside) & self.exists[:, None]

    def within(self, window: jax.Array) -> "IntervalMask":
        """Return the mask of a layer that slides.

        Positions rise by one from key to key: in the prefix, and on from its
        end in the interval.

        Args:
          window: i32[] keys that a token attends to, its own included.
        """
        end = self.last + 1 - window
        return self.replace(
            begin=jnp.maximum(self.begin, self.prefix - self.first + end),
            first=jnp.maximum(self.first, end),
        )

    def widen(self, length: int) -> "IntervalMask":
        """Return the same over ``length`` keys; the new ones are masked."""
        more = length - self.exists.shape[-1]
        return self.replace(exists=jnp.pad(self.exists, ((0, 0), (0, more))))


@struct.dataclass
class BranchMask:
    """Which keys the newest token of each branch attends to.

    Branches side by side: behind the keys that were read, each step of all
    M branches has M keys. The token of branch m attends to a prefix of the
    read ones, and of those behind them to every M-th: its branch's own.

    Attributes:
      exists: bool[B, L + M * (K - 1)] keys that are read or written.
      prefix: i32[B, M] keys from the first that a token attends to.
      read: L.
    """

    exists: jax.Array
    prefix: jax.Array
    read: int = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """Return the same as bool[B, M, L + M * (K - 1)]."""
        count = self.prefix.shape[-1]
        key = jnp.arange(self.exists.shape[-1])
        branch = (key - self.read) % count == jnp.arange(count)[:, None]
        branch &= key >= self.read
        prefix = key < self.prefix[..., None]
        return (prefix | branch) & self.exists[:, None]


@struct.dataclass
class CachedMask:
    """Which keys the newest token of each row attends to: all written ones.

    Attributes:
      exists: bool[B, L] keys that any token may attend to.
      length: i32[] keys that are written, the newest token's included.
      usual: what ``length`` is on average, in the loop that writes; says what
        reading them costs.
    """

    exists: jax.Array
    length: jax.Array
    usual: int = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """Return the same as bool[B, 1, L]."""
        key = jnp.arange(self.exists.shape[-1])
        return (self.exists & (key < self.length))[:, None]


@struct.dataclass
class RolloutMask:
    """Intervals of a rollout that branches leave, and of these branches.

    Attention needs the intervals alone; a layer that reads in order must know
    which state a branch starts from.

    Attributes:
      intervals: of the rollout's tokens, and of those of M branches, one
        branch after the other, if they are read too.
      leaves: i32[B, M] columns before which each branch leaves; at least 1.
      read: L, columns of the rollout.
    """

    intervals: IntervalMask
    leaves: jax.Array
    read: int = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """Return the same as bool[B, S, L]."""
        return self.intervals.dense()


# What a decoder takes: bool[B, S, L], or one of these.
Mask = jax.Array | IntervalMask | BranchMask | CachedMask | RolloutMask


def causal_mask(mask: jax.Array) -> jax.Array:
    """Return which earlier tokens each token attends to.

    Args:
      mask: bool[B, L] which tokens exist.

    Returns:
      bool[B, L, L]: query, key; existing keys that are not after the query.
    """
    order = jnp.arange(mask.shape[-1])
    return (order[:, None] >= order[None, :]) & mask[:, None, :]


def causal_intervals(exists: jax.Array) -> IntervalMask:
    """Let each token attend to the existing ones that are not after it.

    Args:
      exists: bool[B, L] which keys exist.

    Returns:
      IntervalMask of L tokens over L keys, those of
      :func:`causal_mask`.
    """
    order = jnp.broadcast_to(
        jnp.arange(exists.shape[-1], dtype=jnp.int32), exists.shape
    )
    zero = jnp.zeros_like(order)
    return IntervalMask(exists, zero, zero, zero, order)


def packed_intervals(segments: jax.Array) -> IntervalMask:
    """Let each token attend to its own segment up to itself.

    Args:
      segments: i32[B, L] segment of each key; those of one stand together.
        Padding is a segment too, of its own.

    Returns:
      IntervalMask of L tokens over L keys.
    """
    mask = causal_intervals(jnp.ones(segments.shape, bool))
    new = segments[:, 1:] != segments[:, :-1]
    new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new, mask.last, 0), axis=1)
    return mask.replace(first=first)


def branch_intervals(
    exists: jax.Array, start: jax.Array, window: jax.Array
) -> IntervalMask:
    """Mask a rollout, and behind it branches that leave it.

    The token i of branch m attends to the rollout before its start and to
    the tokens 0 .. i of its own branch.

    Args:
      exists: bool[B, L] rollout keys that exist.
      start: i32[B, M] key of the rollout that each branch replaces.
      window: bool[B, M, K] which tokens of the branches exist.

    Returns:
      IntervalMask of L + M * K tokens over as many keys.
    """
    rows, count, steps = window.shape
    length, extra = exists.shape[1], count * steps
    mask = causal_intervals(
        jnp.concatenate([exists, window.reshape(rows, extra)], axis=1)
    )
    prefix = jnp.repeat(start.astype(jnp.int32), steps, axis=1)
    first = length + jnp.arange(extra, dtype=jnp.int32) // steps * steps
    return mask.replace(
        prefix=update_slice(mask.prefix, prefix, (0, length)),
        first=mask.first.at[:, length:].set(first),
    )
