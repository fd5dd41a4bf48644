"""Checks of the inputs of rollouts and branches.

What is static (shapes, dtypes, Python numbers) is checked before tracing. The
values of arrays are checked where :func:`checked` wraps the call; elsewhere
the compiler drops these checks.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from topd_jax.types import Candidates, Prompts, Trajectories


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it checks the values of its arrays.

    Rollouts, branches and losses contain checks that run only here: prompts
    are padded on the left and not empty, ids are in the vocabulary, candidate
    positions are in the completion.

    Args:
      fn: any function of this package, or one that calls them, jitted or not.

    Returns:
      The function with the same arguments and result. It raises ValueError
      with the first check that fails.

    Example:
      ``checked(rollout)(model, prompts, key, max_new_tokens=8, ...)``
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]

        # Python numbers stay what they are: many are static.
        def call(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            merged = [
                next(rest) if array else x
                for x, array in zip(leaves, is_array, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, merged)
            return fn(*args, **kwargs)

        arrays = [x for x, a in zip(leaves, is_array, strict=True) if a]
        error, out = checkify.checkify(call, errors=checkify.user_checks)(
            arrays
        )
        message = error.get()
        if message is not None:
            raise ValueError(message.removesuffix(" (`check` failed)"))
        return out

    return run


def check_prompts(prompts: Prompts) -> None:
    """Check shapes and dtypes of prompts.

    Raises:
      ValueError: unless they are integers and booleans of one shape [B, P],
        and so are the teacher's, of as many rows.
    """
    tokens, mask = jnp.shape(prompts.tokens), jnp.shape(prompts.mask)
    if len(tokens) != 2 or tokens != mask or 0 in tokens:
        raise ValueError(
            f"prompts.tokens {tokens} and prompts.mask {mask} must have one "
            "shape [B, P] with B, P >= 1; a single prompt has B=1"
        )
    _check_integers("prompts.tokens", prompts.tokens)
    _check_booleans("prompts.mask", prompts.mask)
    if prompts.teacher is None:
        return
    check_prompts(prompts.teacher)
    if (rows := len(prompts.teacher.tokens)) != tokens[0]:
        raise ValueError(
            f"prompts.teacher has {rows} rows and must have {tokens[0]}, one "
            "for each prompt"
        )


def check_prompt_values(prompts: Prompts, vocab_size: int) -> None:
    """Check the values of prompts; runs under :func:`checked` alone.

    Args:
      prompts: tokens i32[B, P] and mask bool[B, P].
      vocab_size: V.
    """
    mask = prompts.mask
    empty = ~jnp.any(mask, axis=1)
    checkify.debug_check(
        ~jnp.any(empty),
        "row {row} of prompts.mask has no token; leave empty prompts out",
        row=jnp.argmax(empty),
    )
    gap = jnp.any(mask[:, :-1] & ~mask[:, 1:], axis=1)
    checkify.debug_check(
        ~jnp.any(gap),
        "row {row} of prompts.mask is not padded on the left; move the "
        "padding before the prompt",
        row=jnp.argmax(gap),
    )
    wrong = mask & ((prompts.tokens < 0) | (prompts.tokens >= vocab_size))
    checkify.debug_check(
        ~jnp.any(wrong),
        "prompts.tokens has the id {id} and ids must lie in 0.."
        f"{vocab_size - 1}, the rows of the model's head",
        id=prompts.tokens.reshape(-1)[jnp.argmax(wrong)],
    )


def check_ends(eos_ids: Sequence[int], drawn: int) -> None:
    """Refuse ends of which none is ever drawn.

    Args:
      eos_ids: end-of-sequence ids; () never ends.
      drawn: ids from here on are never drawn.

    Raises:
      ValueError: naming the ids and the bound.
    """
    if eos_ids and min(eos_ids) >= drawn:
        raise ValueError(
            f"eos_ids={tuple(eos_ids)} must have one below vocab_size={drawn}, "
            "or nothing ends; pass len(tokenizer) or the rows of the head: the "
            "vocab_size of a tokenizer of transformers leaves added tokens out"
        )


def check_limits(
    limits: Sequence[int] | jax.Array | None, rows: int
) -> jax.Array | None:
    """Refuse limits that are not of each row.

    Args:
      limits: tokens of each row at the most, integers; or None.
      rows: completions, all samples of all prompts.

    Returns:
      i32[rows], or None.

    Raises:
      ValueError: for another shape, or what is no integer.
    """
    if limits is None:
        return None
    limits = jnp.asarray(limits)
    if limits.shape != (rows,) or not jnp.issubdtype(limits.dtype, jnp.integer):
        raise ValueError(
            f"limits is {limits.dtype}{[*limits.shape]} and must be int32"
            f"[{rows}], one for each of the samples of each prompt"
        )
    return limits.astype(jnp.int32)


def check_candidates(candidates: Candidates, rows: int) -> None:
    """Check shapes and dtypes of candidates.

    Raises:
      ValueError: unless they are integers and booleans of one shape [B, M].
    """
    positions, mask = candidates.positions, candidates.mask
    shape = jnp.shape(positions)
    if len(shape) != 2 or shape[0] != rows or jnp.shape(mask) != shape:
        raise ValueError(
            f"candidates.positions {shape} and candidates.mask "
            f"{jnp.shape(mask)} must have one shape [B={rows}, M]"
        )
    _check_integers("candidates.positions", positions)
    _check_booleans("candidates.mask", mask)


def check_candidate_values(
    candidates: Candidates, trajectories: Trajectories
) -> None:
    """Check the values of candidates; runs under :func:`checked` alone.

    Args:
      candidates: positions i32[B, M] and mask bool[B, M].
      trajectories: that they are positions of.
    """
    positions, length = candidates.positions, trajectories.tokens.shape[1]
    wrong = (positions < 0) | (positions >= length)
    checkify.debug_check(
        ~jnp.any(wrong),
        "candidates.positions has {position} and positions must lie in 0.."
        f"{length - 1}, the columns of the completions; unused slots have 0",
        position=positions.reshape(-1)[jnp.argmax(wrong)],
    )


def check_vocab_size(rows: int, vocab_size: int | None) -> int:
    """Return how many ids may be drawn.

    Args:
      rows: of the model's head.
      vocab_size: ids from here on are never drawn; None allows all.

    Returns:
      ``vocab_size``, or ``rows``.

    Raises:
      ValueError: where the head has fewer rows.
    """
    if vocab_size is None:
        return rows
    if not 1 <= vocab_size <= rows:
        raise ValueError(
            f"vocab_size={vocab_size} must lie in 1..{rows}, the rows of the "
            "model's head"
        )
    return int(vocab_size)


def check_ids(
    eos_ids: Sequence[int], pad_id: int, vocab_size: int
) -> tuple[int, ...]:
    """Refuse special ids that the vocabulary does not have.

    Args:
      eos_ids: end-of-sequence ids.
      pad_id: id of the padding.
      vocab_size: V.

    Returns:
      ``eos_ids`` as a tuple of int.

    Raises:
      ValueError: naming the id and the bound.
    """
    if isinstance(eos_ids, int):
        raise ValueError(f"eos_ids={eos_ids} must be a sequence: ({eos_ids},)")
    eos_ids = tuple(operator.index(i) for i in eos_ids)
    for name, value in [("pad_id", pad_id), *(("eos_ids", i) for i in eos_ids)]:
        if not 0 <= value < vocab_size:
            raise ValueError(
                f"{name}: {value} must lie in 0..{vocab_size - 1}, the rows "
                "of the model's head; does the tokenizer belong to the model?"
            )
    return eos_ids


def _check_integers(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise ValueError(
            f"{name} has dtype {jnp.result_type(x)} and must be integers"
        )


def _check_booleans(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.bool_):
        raise ValueError(
            f"{name} has dtype {jnp.result_type(x)} and must be bool; pass "
            "mask != 0"
        )
