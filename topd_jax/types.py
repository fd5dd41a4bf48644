"""The arrays that travel between the stages of a training step.

Letters used in every shape of this project: ``B`` rows, ``P`` prompt columns
(padded on the left), ``T`` completion columns (padded on the right), ``L = P +
T``, ``M`` candidate slots a row, ``K`` tokens of a window, ``V`` vocabulary,
``D`` width of the hidden states.

Everything about a generated token is in *completion coordinates*: entry ``t``
of a ``[B, T]`` array is about the completion's token ``y_t``. The model
predicts ``y_t`` from the position before it; :func:`completion_states` makes
that shift, and nothing else does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


def _unconstrained(x: jax.Array, *axes: str | None) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a fused loss is cut into chunks and spread over a mesh.

    The losses know no mesh. Whoever has one passes its layout in, made by
    :func:`topd_jax.parallel.layouts.loss_layout` for any axis names.

    Attributes:
      chunk_size: tokens whose logits exist at a time; None chooses from the
        shapes.
      ways: devices that each logical axis is spread over; 1 where it names
        none. Axes: "batch" (rows), "sequence" (tokens of a row), "tokens"
        (both), "vocab" (rows of the head).
      constrain: (x, *axes) -> x with its sharding pinned; an axis is "tokens",
        "vocab", "embed" or None.
    """

    chunk_size: int | None = None
    ways: Mapping[str, int] = dataclasses.field(default_factory=dict)
    constrain: Callable[..., jax.Array] = _unconstrained

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"chunk_size={self.chunk_size} must be at least 1; None "
                "chooses it from the shapes"
            )

    def __hash__(self) -> int:
        return hash((self.chunk_size, self.constrain))

    def ways_of(self, axis: str) -> int:
        """Return how many devices a logical axis is spread over."""
        return self.ways.get(axis, 1)


ONE_DEVICE = Layout()


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
    """Return the rows [V, D] of a head."""
    return head.rows if isinstance(head, CappedHead) else head


def head_cap(head: Head) -> float | None:
    """Return the bound of a head's logits, or None."""
    return head.cap if isinstance(head, CappedHead) else None


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bound logits: cap * tanh(x / cap), slope 1 at 0 (arXiv:2408.00118, §2).

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
      teacher: [B, Q] what each row's teacher reads instead, of any width Q;
        None: the same.
    """

    tokens: jax.Array
    mask: jax.Array
    teacher: "Prompts | None" = None


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
      teacher_prompt: [B, Q] what each row's teacher reads before the
        completion instead of the prompt; None: the same.
    """

    prompt: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    truncated: jax.Array
    teacher_prompt: Prompts | None = None

    @property
    def for_teacher(self) -> "Trajectories":
        """The rows as their teachers read them: the same completions."""
        if (own := self.teacher_prompt) is None:
            return self
        return self.replace(
            prompt=own.tokens, prompt_mask=own.mask, teacher_prompt=None
        )

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
class Scored:
    """What one teacher says about its rows of a batch.

    Every array is data: no gradient flows through it. The near-future fields
    are None where the objective does not look ahead.

    Attributes:
      teacher_head: [V, D_teacher] the teacher's output head; None: the
        student's own, see :meth:`head_beside`.
      teacher_hidden: [B, T, D_teacher] the teacher's final hidden states, in
        completion coordinates and its own compute dtype.
      teacher_token_loss: f32[B, T] -log p_T(y_t), nats, 0 outside the mask.
      candidates: the positions that were looked at.
      student_windows: the rollout itself, from each candidate on.
      teacher_windows: the teacher's own continuation of each prefix.
      distance: f32[B, M] how far the two futures are apart, as the detector
        measures it: transport distance 0..2, or nats a token.
      plan: f32[B, M, K, K] transport plan, student tokens by teacher tokens;
        None for a detector without one.
      divergent: bool[B, M] candidates whose futures part.
      false_alarm: bool[B, M] candidates whose futures do not.
      selected: bool[B, M] candidates that a token weight acts on.
      teacher_window_hidden: [B, M, K, D_teacher] the states that predict the
        teacher's windows; kept only where the guidance asks for them.
      weights: f32[B, T] product of the token weights that need the whole
        batch.
      uniforms: f32[B, T] draws in 0..1, where a piece names them: one a token,
        which all pieces that name it share.
      teacher: the teacher's name; "" for the only one. Static.
    """

    teacher_head: Head | None
    teacher_hidden: jax.Array
    teacher_token_loss: jax.Array
    candidates: Candidates | None = None
    student_windows: Windows | None = None
    teacher_windows: Windows | None = None
    distance: jax.Array | None = None
    plan: jax.Array | None = None
    divergent: jax.Array | None = None
    false_alarm: jax.Array | None = None
    selected: jax.Array | None = None
    teacher_window_hidden: jax.Array | None = None
    weights: jax.Array | None = None
    uniforms: jax.Array | None = None
    teacher: str = struct.field(pytree_node=False, default="")

    def head_beside(self, student: Any) -> Head:
        """Return the teacher's head [V, D_teacher], all of it data.

        Args:
          student: the model that was scored.
        """
        if self.teacher_head is not None:
            return self.teacher_head
        return jax.lax.stop_gradient(student.head)


@struct.dataclass
class Teacher:
    """A teacher, and how many prompts of each batch are its own.

    Attributes:
      model: any :class:`~topd_jax.models.protocol.LanguageModel`, frozen;
        None: the student itself, as it is at every step.
      name: "" for the only one; static.
      prompts: consecutive prompts of every batch that belong to it; static.
        The only teacher reads every row, whatever the number.
    """

    model: Any
    name: str = struct.field(pytree_node=False, default="")
    prompts: int = struct.field(pytree_node=False, default=1)

    def beside(self, student: Any) -> Any:
        """Return the model that reads.

        Args:
          student: as it is now.
        """
        return student if self.model is None else self.model


def positions_of(mask: jax.Array) -> jax.Array:
    """Return the rotary positions of the columns that exist.

    Args:
      mask: bool[..., L] which columns exist.

    Returns:
      i32[..., L]: 0 for the first existing column, counting only existing
      ones; padding repeats its left neighbour's position (0 on the left).
    """
    count = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return jnp.maximum(count - 1, 0)


def completion_states(hidden: jax.Array, prompt_length: int) -> jax.Array:
    """Return the states that predict each completion token.

    The only place that shifts tokens against states.

    Args:
      hidden: [B, P + T, D] states of prompt and completion.
      prompt_length: P, the number of prompt columns, 1..P + T - 1.

    Returns:
      [B, T, D]: entry t is the state of column P + t - 1, which predicts
      token y_t.

    Raises:
      ValueError: for a prompt length out of bounds.
    """
    if not 1 <= prompt_length < hidden.shape[1]:
        raise ValueError(
            f"prompt_length={prompt_length} must lie in "
            f"1..{hidden.shape[1] - 1}, the columns of hidden"
            f"{list(hidden.shape)} before the last completion token"
        )
    return hidden[:, prompt_length - 1 : -1]
