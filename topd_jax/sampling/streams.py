"""Named streams of random numbers, one for each purpose outside the steps.

Training step i draws from ``fold_in(key, i)``. Everything else that draws from
the same seed has a stream of its own, so no two purposes share numbers.
"""

import enum

import jax


@enum.unique
class Stream(enum.IntEnum):
    """What the random numbers are for; above the number of any step."""

    EVALUATE = 2**31 - 1
    GENERATE = 2**31 - 2
    OBSERVE = 2**31 - 3
    DOCTOR = 2**31 - 6
    ROLLBACK = 2**31 - 7


def stream_key(key: jax.Array, stream: Stream) -> jax.Array:
    """Return the key of a named stream.

    Args:
      key: PRNG key of the run, ``jax.random.key(seed)``.
      stream: the purpose.

    Returns:
      A PRNG key. Fold a batch's number into it before drawing.
    """
    return jax.random.fold_in(key, int(stream))
