"""Continue many prefixes of every row at once, on one cache.

The teacher has read the whole rollout, so its cache already holds every prefix
y_{<t}. Its own continuations from M candidate positions are written *behind*
the rollout, M columns per step: token i of branch m sees the columns before
y_t and the columns of branch m, and is compared with no others. No prefix is
copied: K - 1 steps of M queries per row are all that the teacher windows of
arXiv:2606.00305, §3 cost. The paper does not say how it computes them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.models.attention.masks import BranchMask
from topd_jax.models.decoder import in_compute_dtype, is_recurrent, mask_for
from topd_jax.models.passes import prefix_cache
from topd_jax.models.protocol import LanguageModel
from topd_jax.parallel.rules import decoding_rules, using
from topd_jax.parallel.sharding import constrain_rows, reshard
from topd_jax.sampling.checks import (
    check_candidate_values,
    check_candidates,
    check_ends,
    check_ids,
    check_vocab_size,
)
from topd_jax.sampling.drawing import Drawn, draw_token, nothing_drawn
from topd_jax.sampling.samplers import check_sampler, row_noise
from topd_jax.types import Candidates, Trajectories, Windows


def branch_columns(count: int, length: int) -> int:
    """Return the cache columns that branches need behind the rollout's own.

    Args:
      count: M, branches per row.
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
    vocab_size: int,
    temperature: float | jax.Array = 0.0,
    key: jax.Array | None = None,
    return_hidden: bool = False,
    sharding: str = "train",
) -> tuple[Windows, jax.Array | None]:
    """Continue every candidate's prefix y_{<t}: the windows T_t of §3.

    Args:
      model: the model that has read the trajectories. What
        :func:`~topd_jax.models.layerwise.unstack` makes of a small one, for
        positions to L + K, reads and branches faster on a CPU.
      cache: of that reading, made by ``model.init_cache(B, L +
        branch_columns(M, K))``, with ``L`` columns written; None of a
        decoder with recurrent layers, which reads the trajectories again.
      hidden: [B, T, D] its final states in completion coordinates; entry t
        predicts the first token of branch t, without another forward pass.
      trajectories: what was read.
      candidates: positions [B, M] to branch off.
      length: K, at least 1.
      eos_ids: tokens that end a window.
      pad_id: put after the end and in slots that are not used.
      vocab_size: ids from here on are never drawn: the ids that both models
        have, or the rows of the model's head for all of them.
      temperature: 0 (greedy) to 1000.
      key: PRNG key; needed unless greedy.
      return_hidden: also return the states that the tokens were drawn from.
      sharding: where parameters are meanwhile, on a mesh: "train", as the
        rules in force have them; or "gathered" or "rows" of
        :data:`~topd_jax.parallel.rules.DECODING`, which leave the cache in
        place, whose rows are spread as
        :func:`~topd_jax.parallel.rules.reading_rules` has them.

    Returns:
      (windows [B, M, K]; the states [B, M, K, D], of which entry i predicts
      token i of the window, 0 where it has ended, or None).

    Raises:
      ValueError: where shapes do not fit, or a key is missing.
    """
    ids = check_vocab_size(model.head.shape[0], vocab_size)
    check_sampler(temperature, length=length)
    greedy = isinstance(temperature, int | float) and temperature == 0
    if key is None and not greedy:
        raise ValueError(
            f"branch at temperature={temperature} needs a key; pass key=, or "
            "temperature=0.0 for the greedy continuation"
        )
    eos_ids = check_ids(eos_ids, pad_id, model.head.shape[0])
    check_ends(eos_ids, ids)
    check_candidates(candidates, trajectories.tokens.shape[0])
    _check_reading(model, cache, hidden, trajectories, candidates, length)
    return _branch(
        model,
        cache,
        hidden,
        trajectories,
        candidates,
        jnp.asarray(temperature, jnp.float32),
        jax.random.key(0) if key is None else key,
        length=int(length),
        eos_ids=eos_ids,
        pad_id=int(pad_id),
        vocab_size=ids,
        return_hidden=return_hidden,
        sharding=sharding,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "length", "eos_ids", "pad_id", "vocab_size", "return_hidden",
        "sharding",
    ),
)  # fmt: skip
def _branch(
    model: Any,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    *args: Any,
    sharding: str,
    **options: Any,
) -> tuple[Windows, jax.Array | None]:
    check_candidate_values(candidates, trajectories)
    if is_recurrent(model):
        count = candidates.positions.shape[1]
        columns = branch_columns(count, options["length"])
        columns += trajectories.sequence.shape[1]
        cache = prefix_cache(model, trajectories, candidates, columns)
    args = (cache, hidden, trajectories, candidates, *args)
    if sharding == "train":
        return _write(model, *args, **options)
    with using(decoding_rules(sharding)):
        model = reshard(in_compute_dtype(model), model.logical_axes)
        out = _write(model, *args, **options)
        return constrain_rows(out)


def _write(
    model: Any,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    temperature: jax.Array,
    key: jax.Array,
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
    branch_mask, written_at = _branch_mask(
        trajectories, candidates, branch_columns(count, length)
    )
    draw_next = functools.partial(
        draw_token,
        head=model.head[:vocab_size],
        noise=row_noise(key, jnp.arange(rows), (length, count, 2)),
        temperature=temperature,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )

    def more(carry: tuple[Drawn, Any]) -> jax.Array:
        return (carry[0].step < length) & ~jnp.all(carry[0].done)

    def body(carry: tuple[Drawn, Any]) -> tuple[Drawn, Any]:
        drawn, cache = carry
        exists = branch_mask.exists & (written_at < drawn.step)
        mask = mask_for(model, branch_mask.replace(exists=exists))
        position = first + drawn.step - 1
        hidden, cache = model(drawn.last, position, mask, cache)
        return draw_next(drawn, hidden), cache

    start = jnp.take_along_axis(hidden, candidates.positions[..., None], axis=1)
    states = start if return_hidden else None
    drawn = nothing_drawn(~candidates.mask, length, pad_id, states)
    drawn = draw_next(drawn, start)
    if length > 1:  # else the cache has no column to write to
        drawn, _ = jax.lax.while_loop(more, body, (drawn, cache))
    return Windows(drawn.tokens, drawn.mask), drawn.states


def _branch_mask(
    trajectories: Trajectories, candidates: Candidates, extra: int
) -> tuple[BranchMask, jax.Array]:
    """Return the columns that branches see, and the step that writes each.

    Returns:
      (all that they ever see; i32[L + extra], -1 for the rollout's columns).
    """
    exists = trajectories.sequence_mask
    read, count = exists.shape[1], candidates.positions.shape[1]
    behind = jnp.arange(read + extra) - read
    step = jnp.where(behind < 0, -1, behind // count)
    exists = jnp.pad(exists, ((0, 0), (0, extra)), constant_values=True)
    prefix = candidates.positions + trajectories.prompt.shape[1]
    return BranchMask(exists, prefix, read), step


def _check_reading(
    model: Any,
    cache: Any,
    hidden: jax.Array,
    trajectories: Trajectories,
    candidates: Candidates,
    length: int,
) -> None:
    rows, written = trajectories.tokens.shape
    if hidden.shape[:2] != (rows, written):
        raise ValueError(
            f"hidden {hidden.shape} must be [B={rows}, T={written}, D], in "
            "completion coordinates; see completion_states"
        )
    if is_recurrent(model):
        return
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
