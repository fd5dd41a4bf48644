"""What each token sees, told by where it begins and ends. Ours.

A mask bool[B, S, L] is 1 GiB a row at 32k tokens. All that rollouts, branches
and packed rows ask for is said by three columns a token: it sees a prefix,
and a stretch that ends with itself. Attention that reads a block of queries
at a time makes the mask of that block alone. Branches that are being written
see a prefix, and columns of their own that stand apart.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Spans:
    """The columns that each token sees.

    Token s sees column l where ``exists[l]`` and either ``l < prefix[s]`` or
    ``first[s] <= l <= last[s]``.

    Attributes:
      exists: bool[B, L] columns that any token may see.
      prefix: i32[B, S] how many columns, from the first, a token sees.
      first: i32[B, S] first column of its own stretch.
      last: i32[B, S] last column of it.
    """

    exists: jax.Array
    prefix: jax.Array
    first: jax.Array
    last: jax.Array

    def dense(self) -> jax.Array:
        """bool[B, S, L]: the same as a mask."""
        column = jnp.arange(self.exists.shape[-1])
        own = self.first[..., None] <= column
        own &= column <= self.last[..., None]
        return ((column < self.prefix[..., None]) | own) & (
            self.exists[:, None]
        )

    def widen(self, columns: int) -> "Spans":
        """The same over ``columns`` columns; those behind are not seen."""
        more = columns - self.exists.shape[-1]
        return self.replace(exists=jnp.pad(self.exists, ((0, 0), (0, more))))


@struct.dataclass
class Branching:
    """The columns that the newest token of each branch sees.

    Branches side by side: behind the columns that were read, each step of all
    M branches has M columns. The token of branch m sees a prefix of the read
    ones, and of those behind them every M-th: its branch's own.

    Attributes:
      exists: bool[B, L + M * (K - 1)] columns that are read or written.
      prefix: i32[B, M] how many columns, from the first, a token sees.
      read: L.
    """

    exists: jax.Array
    prefix: jax.Array
    read: int = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """bool[B, M, L + M * (K - 1)]: the same as a mask."""
        count = self.prefix.shape[-1]
        column = jnp.arange(self.exists.shape[-1])
        own = (column - self.read) % count == jnp.arange(count)[:, None]
        own &= column >= self.read
        return ((column < self.prefix[..., None]) | own) & (
            self.exists[:, None]
        )


@struct.dataclass
class Written:
    """What the newest token of each row sees: all that is written.

    Attributes:
      exists: bool[B, L] columns that any token may see.
      length: i32[] columns that are written, the newest token's included.
      usual: what ``length`` is on average, in the loop that writes; says what
        reading them costs.
    """

    exists: jax.Array
    length: jax.Array
    usual: int = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """bool[B, 1, L]: the same as a mask."""
        written = jnp.arange(self.exists.shape[-1]) < self.length
        return (self.exists & written)[:, None]


# What a decoder takes: bool[B, S, L], or one of these.
Mask = jax.Array | Spans | Branching | Written


def causal_spans(exists: jax.Array) -> Spans:
    """Each column sees the existing ones that are not after it.

    Args:
      exists: bool[B, L] which columns exist.

    Returns:
      Spans of L tokens over L columns, those of
      :func:`~topd_jax.models.decoder.causal_mask`.
    """
    order = jnp.broadcast_to(
        jnp.arange(exists.shape[-1], dtype=jnp.int32), exists.shape
    )
    zero = jnp.zeros_like(order)
    return Spans(exists, zero, zero, order)


def packed_spans(segments: jax.Array) -> Spans:
    """Each column sees those of its own segment that are not after it.

    Args:
      segments: i32[B, L] segment of each column; those of one stand together.
        Padding is a segment too: it sees padding, and nothing sees padding.

    Returns:
      Spans of L tokens over L columns.
    """
    spans = causal_spans(jnp.ones(segments.shape, bool))
    new = segments[:, 1:] != segments[:, :-1]
    new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new, spans.last, 0), axis=1)
    return spans.replace(first=first)


def branch_spans(
    exists: jax.Array, start: jax.Array, window: jax.Array
) -> Spans:
    """Rollout columns, and behind them branches that leave the rollout.

    The token i of branch m sees the rollout before its start and the tokens
    0 .. i of its own branch.

    Args:
      exists: bool[B, L] rollout columns that exist.
      start: i32[B, M] column of the rollout that each branch replaces.
      window: bool[B, M, K] which tokens of the branches exist.

    Returns:
      Spans of L + M * K tokens over as many columns.
    """
    rows, count, steps = window.shape
    length, extra = exists.shape[1], count * steps
    spans = causal_spans(
        jnp.concatenate([exists, window.reshape(rows, extra)], axis=1)
    )
    prefix = jnp.repeat(start.astype(jnp.int32), steps, axis=1)
    first = length + jnp.arange(extra, dtype=jnp.int32) // steps * steps
    return spans.replace(
        prefix=jax.lax.dynamic_update_slice(spans.prefix, prefix, (0, length)),
        first=spans.first.at[:, length:].set(first),
    )
