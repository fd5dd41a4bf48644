"""The arrays that travel between the phases of a training step.

Letters used in every shape of this project: ``B`` rows, ``P`` prompt columns
(padded on the left), ``T`` completion columns (padded on the right), ``L = P +
T``, ``M`` candidate slots a row, ``K`` tokens of a window, ``V`` vocabulary,
``D`` width of the hidden states.

Everything that is said of a generated token is said in *completion
coordinates*: entry ``t`` of a ``[B, T]`` array is about the completion's token
``y_t``. The model predicts ``y_t`` from the column before it;
:func:`completion_states` makes that shift, and nothing else does.
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


@struct.dataclass
class Prompts:
    """A batch of prompts, padded on the left.

    Attributes:
      tokens: i32[B, P] token ids, padding on the left.
      mask: bool[B, P] which of them exist.
    """

    tokens: jax.Array
    mask: jax.Array


@struct.dataclass
class Trajectories:
    """Prompts with the completions that a model sampled for them.

    Attributes:
      prompt: i32[B, P] prompt ids, padded on the left.
      prompt_mask: bool[B, P] which of them exist.
      tokens: i32[B, T] completion ids, padded on the right.
      mask: bool[B, T] generated tokens, up to and including the first
        end-of-sequence token.
      logp: f32[B, T] log-probability with which each token was drawn, under
        the sampler's own (tempered, filtered) distribution; 0 outside mask.
      truncated: bool[B] the row reached ``T`` tokens without ending.
    """

    prompt: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    truncated: jax.Array

    @property
    def sequence(self) -> jax.Array:
        """i32[B, P + T]: prompt and completion side by side."""
        return jnp.concatenate([self.prompt, self.tokens], axis=-1)

    @property
    def sequence_mask(self) -> jax.Array:
        """bool[B, P + T]: which columns of :attr:`sequence` exist."""
        return jnp.concatenate([self.prompt_mask, self.mask], axis=-1)

    @property
    def positions(self) -> jax.Array:
        """i32[B, P + T]: rotary position of each column, 0 at the first."""
        return positions_of(self.sequence_mask)


@struct.dataclass
class Candidates:
    """High-loss positions of each trajectory, in static slots.

    Attributes:
      positions: i32[..., M] completion index of each candidate, ascending;
        0 in slots that are not used.
      mask: bool[..., M] which slots are used.
    """

    positions: jax.Array
    mask: jax.Array


@struct.dataclass
class Windows:
    """The K tokens that follow each candidate's prefix.

    Attributes:
      tokens: i32[..., M, K] token ids, the first one at the candidate itself.
      mask: bool[..., M, K] which exist: up to and including the first
        end-of-sequence token.
    """

    tokens: jax.Array
    mask: jax.Array


@struct.dataclass
class Annotations:
    """What the frozen teacher says of a batch of trajectories.

    Every array is data: no gradient flows through it. The near-future fields
    are None when the objective does not look ahead.

    Attributes:
      teacher_hidden: [B, T, D_teacher] the teacher's final hidden states, in
        completion coordinates and its own compute dtype.
      teacher_token_loss: f32[B, T] -log p_T(y_t), 0 outside the mask.
      candidates: the positions that were looked at.
      student_windows: the rollout itself, from each candidate on.
      teacher_windows: the teacher's own continuation of each prefix.
      distance: f32[B, M] transport distance of the two windows, 0..2; of the
        detector "future_loss" the mean loss of the student's, nats a token.
      plan: f32[B, M, K, K] transport plan, student tokens by teacher tokens.
      divergent: bool[B, M] candidates whose futures part.
      false_alarm: bool[B, M] candidates whose futures do not.
      capped: bool[B, M] candidates whose loss is capped at the row's median:
        the false alarms, or in the control as many divergent ones.
      teacher_window_hidden: [B, M, K, D_teacher] the states that predict the
        teacher's windows; kept only where a loss along them needs the
        teacher's whole distribution.
      weights: f32[B, T] what a sibling method makes of each token.
      lots: f32[B, T] uniform draws, for a loss that takes chances.
    """

    teacher_hidden: jax.Array
    teacher_token_loss: jax.Array
    candidates: Candidates | None = None
    student_windows: Windows | None = None
    teacher_windows: Windows | None = None
    distance: jax.Array | None = None
    plan: jax.Array | None = None
    divergent: jax.Array | None = None
    false_alarm: jax.Array | None = None
    capped: jax.Array | None = None
    teacher_window_hidden: jax.Array | None = None
    weights: jax.Array | None = None
    lots: jax.Array | None = None


def positions_of(mask: jax.Array) -> jax.Array:
    """Rotary positions of the columns that exist.

    Args:
      mask: bool[..., L] which columns exist.

    Returns:
      i32[..., L]: 0 for the first existing column, counting only existing
      ones; padding repeats its left neighbour's position (0 on the left).
    """
    count = jnp.cumsum(mask.astype(jnp.int32), axis=-1)
    return jnp.maximum(count - 1, 0)


def completion_states(hidden: jax.Array, prompt_length: int) -> jax.Array:
    """The states that predict each completion token: the one shift there is.

    Args:
      hidden: [B, P + T, D] states of prompt and completion.
      prompt_length: P, the number of prompt columns.

    Returns:
      [B, T, D]: entry t is the state of column P + t - 1, which predicts
      token y_t.
    """
    return hidden[:, prompt_length - 1 : -1]
