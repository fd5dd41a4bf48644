"""Forward passes of any model over trajectories, and along branches of them."""

from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import (
    RolloutMask,
    branch_intervals,
    causal_intervals,
)
from topd_jax.models.decoder import is_recurrent, mask_for
from topd_jax.models.protocol import LanguageModel
from topd_jax.types import (
    Candidates,
    Trajectories,
    Windows,
    completion_states,
)


def trajectory_states(
    model: LanguageModel, trajectories: Trajectories
) -> jax.Array:
    """Compute the states that predict each completion token.

    Args:
      model: any model.
      trajectories: B rows.

    Returns:
      [B, T, D] in completion coordinates and compute dtype.
    """
    mask = causal_intervals(trajectories.sequence_mask)
    hidden, _ = model(
        trajectories.sequence, trajectories.positions, mask_for(model, mask)
    )
    return completion_states(hidden, trajectories.prompt.shape[1])


def trajectory_cache(
    model: LanguageModel, trajectories: Trajectories, columns: int
) -> tuple[jax.Array, Any]:
    """Compute the same states, and keep the cache for branches.

    Of a model with recurrent layers there is none yet: the states of all
    prefixes would not fit. See :func:`prefix_cache`.

    Args:
      model: any model with a cache.
      trajectories: B rows.
      columns: key/value positions of the cache, at least P + T.

    Returns:
      (states [B, T, D], the cache after all P + T columns or None).
    """
    if is_recurrent(model):
        return trajectory_states(model, trajectories), None
    tokens = trajectories.sequence
    mask = causal_intervals(trajectories.sequence_mask).widen(columns)
    hidden, cache = model(
        tokens,
        trajectories.positions,
        mask_for(model, mask),
        model.init_cache(tokens.shape[0], columns),
    )
    return completion_states(hidden, trajectories.prompt.shape[1]), cache


def prefix_cache(
    model: Any, trajectories: Trajectories, candidates: Candidates, columns: int
) -> Any:
    """Read trajectories once more, and keep the state at each candidate.

    Args:
      model: a decoder with recurrent layers.
      trajectories: B rows.
      candidates: [B, M] where branches will leave.
      columns: key/value positions of the cache, at least P + T.

    Returns:
      The cache: keys and values of all P + T columns, and states of the M
      prefixes.
    """
    tokens = trajectories.sequence
    mask = causal_intervals(trajectories.sequence_mask).widen(columns)
    leaves = candidates.positions + trajectories.prompt.shape[1]
    _, cache = model(
        tokens,
        trajectories.positions,
        RolloutMask(mask, leaves, tokens.shape[1]),
        model.init_cache(tokens.shape[0], columns, leaves.shape[1]),
    )
    return cache


def branch_states(
    model: LanguageModel,
    trajectories: Trajectories,
    candidates: Candidates,
    windows: Windows,
) -> tuple[jax.Array, jax.Array]:
    """Compute the states of the rollout and along branches, in one pass.

    The branches' tokens are extra columns, each attending to its prefix and
    to itself (arXiv:2606.00305, §5.2: c_{t+i} = y_{<t} + T_t[:i]). The first
    state of a branch is the rollout's own: both contexts are y_{<t}.

    Args:
      model: any model.
      trajectories: B rows.
      candidates: [B, M] where the branches leave.
      windows: [B, M, K] their tokens, the first one at the candidate.

    Returns:
      ([B, T, D] states of the rollout, [B, M, K, D] along the branches), in
      compute dtype.
    """
    tokens, positions = trajectories.sequence, trajectories.positions
    exists, prompt = trajectories.sequence_mask, trajectories.prompt.shape[1]
    length = tokens.shape[1]
    start = candidates.positions + prompt  # column of y_t
    rows, count, window = windows.tokens.shape
    extra = windows.tokens[..., :-1].reshape(rows, -1)
    first = jnp.take_along_axis(positions, start - 1, axis=1) + 1
    extra_positions = first[..., None] + jnp.arange(window - 1)
    mask = branch_intervals(exists, start, windows.mask[..., :-1])
    hidden, _ = model(
        jnp.concatenate([tokens, extra], axis=1),
        jnp.concatenate([positions, extra_positions.reshape(rows, -1)], axis=1),
        mask_for(model, RolloutMask(mask, start, length)),
    )
    states = completion_states(hidden[:, :length], prompt)
    at_start = jnp.take_along_axis(
        states, candidates.positions[..., None], axis=1
    )
    # The width is named: of no columns, -1 would stand for none.
    width = hidden.shape[-1]
    along = hidden[:, length:].reshape(rows, count, window - 1, width)
    return states, jnp.concatenate([at_start[:, :, None], along], axis=2)
