"""Prompt widths in buckets, so that a new length does not recompile. Ours."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from topd_jax.types import Prompts


def bucket(length: int, buckets: Sequence[int] | None = None) -> int:
    """The width that prompts of ``length`` tokens are padded to.

    Args:
      length: of the longest prompt.
      buckets: widths to choose from; None takes 8, 16, 24, 32, 48, 64, 96,
        128 …: the powers of two and the middle between each two.

    Returns:
      The smallest bucket that is not below ``length``.

    Raises:
      ValueError: where ``length`` exceeds every bucket.
    """
    if buckets is None:
        power = 8
        while power < length:
            if power > 8 and length <= power * 3 // 2:
                return power * 3 // 2
            power *= 2
        return power
    fitting = [b for b in buckets if b >= length]
    if not fitting:
        raise ValueError(
            f"prompts of {length} tokens exceed the largest bucket "
            f"({max(buckets, default=0)}); add a bucket or shorten the prompts"
        )
    return min(fitting)


def pad_prompts(prompts: Prompts, width: int, pad_id: int) -> Prompts:
    """Pads prompts on the left.

    Args:
      prompts: tokens i32[B, P] and mask bool[B, P].
      width: new P.
      pad_id: id of the padding.

    Returns:
      Prompts of ``width`` columns.

    Raises:
      ValueError: where they are wider already.
    """
    extra = width - prompts.tokens.shape[1]
    if extra < 0:
        raise ValueError(
            f"prompts of {prompts.tokens.shape[1]} columns exceed width="
            f"{width}; choose a larger bucket"
        )
    if extra == 0:
        return prompts
    pad = ((0, 0), (extra, 0))

    def left(x: jax.Array, value: int | bool) -> jax.Array:
        return jnp.pad(x, pad, constant_values=value)

    return Prompts(left(prompts.tokens, pad_id), left(prompts.mask, False))
