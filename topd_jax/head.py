"""Output heads: an array of rows, or one whose logits are soft-capped.

Gemma bounds its logits: ``cap * tanh(<h, W_v> / cap)`` (Gemma Team,
arXiv:2408.00118, §2). Whatever makes logits of a head must bound them too:
losses, sampling and evaluation alike. The cap therefore travels with the rows,
as a static field of the pytree, and not beside them, where it could be
forgotten. Ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class CappedHead:
    """The rows of an output head, and the bound of its logits.

    Attributes:
      rows: [V, D].
      cap: of the logits' absolute value, above 0; static.
    """

    rows: jax.Array
    cap: float = struct.field(pytree_node=False)

    def __getitem__(self, index: Any) -> "CappedHead":
        return self.replace(rows=self.rows[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, D)."""
        return self.rows.shape

    @property
    def ndim(self) -> int:
        """2."""
        return self.rows.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the rows."""
        return self.rows.dtype


Head = jax.Array | CappedHead


def head_rows(head: Head) -> jax.Array:
    """The rows [V, D] of a head."""
    return head.rows if isinstance(head, CappedHead) else head


def head_cap(head: Head) -> float | None:
    """The bound of a head's logits; None where there is none."""
    return head.cap if isinstance(head, CappedHead) else None


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): bounded by cap, slope 1 at 0.

    Args:
      x: f32[...].
      cap: above 0; None leaves x alone.

    Returns:
      f32[...].
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
