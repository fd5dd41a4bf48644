"""One token a row: temperature, top-k, top-p, and the choice itself.

Tokens are drawn by inverting the cumulative distribution, which asks for two
uniform numbers a row; the usual Gumbel noise asks for one a vocabulary entry,
and on CPU costs more than a small model. The vocabulary is cut into blocks of
about its square root: the first number picks a block, the second a token
inside it. The probability of a token is the product of the two, so the draw is
exact, and rare tokens of large vocabularies keep their odds (one 24-bit number
could not tell 150,000 of them apart). All of this is ours.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from topd_jax.parallel.collectives import top_k as top_k_of
from topd_jax.parallel.sharding import constrain

# Up to this many entries one cumulative sum is cheaper than two.
_SINGLE_BLOCK = 256


def check_sampler(
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    top_k: int = 0,
    vocab_size: int | None = None,
) -> None:
    """Refuses sampler settings that mean nothing; traced values pass.

    Args:
      temperature: 0 (greedy) or above.
      top_p: above 0, at most 1 (off).
      top_k: 0 (off) or above.
      vocab_size: V, the bound of ``top_k``, where it is known.

    Raises:
      ValueError: with the value, its bound and a way out.
    """
    if not isinstance(temperature, jax.core.Tracer):
        value = float(temperature)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"temperature={value} must be 0 (greedy) or a positive finite "
                "number; 1 samples from the model itself"
            )
    if not isinstance(top_p, jax.core.Tracer) and not 0 < float(top_p) <= 1:
        raise ValueError(
            f"top_p={float(top_p)} must lie above 0 and be at most 1; 1 "
            "turns it off"
        )
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be an int, 0 (off) or positive")
    if vocab_size is not None and top_k > vocab_size:
        raise ValueError(
            f"top_k={top_k} must be at most the vocabulary, {vocab_size}; 0 "
            "turns it off"
        )


def check_vocab_size(rows: int, vocab_size: int | None) -> int:
    """How many ids may be drawn.

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
            "model's head; None allows them all"
        )
    return int(vocab_size)


def check_ids(
    eos_ids: Sequence[int], pad_id: int, vocab_size: int
) -> tuple[int, ...]:
    """Refuses special ids that the vocabulary does not have.

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


def draw(
    key: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    top_k: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    ``softmax(logits / temperature)``, cut to the ``top_k`` likeliest tokens,
    then to the smallest set of likeliest ones whose share of what is left
    reaches ``top_p`` (Holtzman et al., 1904.09751); ties go to the lower id.

    Args:
      key: PRNG key.
      logits: f32[..., V]; -inf forbids a token.
      temperature: may be traced; 0 takes the likeliest token.
      top_p: a Python 1.0 compiles without it; may be traced otherwise.
      top_k: static; 0 compiles without it.

    Returns:
      (tokens i32[...], logp f32[...]): the log-probability of each token
      under the distribution that it was drawn from; 0 where greedy.

    Raises:
      ValueError: for settings that mean nothing.
    """
    check_sampler(temperature, top_p, top_k, logits.shape[-1])
    noise = jax.random.uniform(key, (*logits.shape[:-1], 2))
    return choose(noise, logits, temperature, switch_off(top_p), top_k)


def switch_off(top_p: float | jax.Array) -> float | jax.Array | None:
    """None in place of a Python 1.0: the filter is not compiled at all."""
    return None if isinstance(top_p, int | float) and top_p >= 1 else top_p


def choose(
    noise: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array,
    top_p: float | jax.Array | None,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """:func:`draw` with the uniform numbers given and nothing checked.

    Args:
      noise: f32[..., 2] uniform in [0, 1).
      logits: f32[..., V].
      temperature: 0 takes the likeliest token.
      top_p: None turns it off.
      top_k: 0 turns it off.

    Returns:
      (tokens i32[...], logp f32[...]), as :func:`draw`.
    """
    temperature = jnp.asarray(temperature, jnp.float32)

    def greedy(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _argmax(logits), jnp.zeros(logits.shape[:-1], jnp.float32)

    def sampled(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits / jnp.where(temperature > 0, temperature, 1.0)
        return _sample(noise, scores, top_p, top_k)

    return jax.lax.cond(temperature > 0, sampled, greedy, noise)


def spread_draws(logits: jax.Array) -> jax.Array:
    """Logits as they are computed, then as tokens are drawn from them.

    They are made where the head's rows are and drawn from where each row is
    whole. The compiler must be told both: told the second alone, it gathers
    the head at every token.

    Args:
      logits: f32[B, ..., V].

    Returns:
      The same numbers.
    """
    between = (None,) * (logits.ndim - 2)
    logits = constrain(logits, "product_batch", *between, "vocab")
    return constrain(logits, "draws", *between, None)


def row_noise(
    key: jax.Array,
    rows: int,
    shape: tuple[int, ...],
    first_row: int | jax.Array = 0,
) -> jax.Array:
    """Uniform numbers that depend on the key and each one's own row alone.

    Args:
      key: PRNG key.
      rows: B.
      shape: of each row's numbers.
      first_row: of a larger batch, whose rows these are from there on.

    Returns:
      f32[B, *shape] in [0, 1).
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
        jnp.arange(rows, dtype=jnp.uint32) + jnp.asarray(first_row, jnp.uint32)
    )
    noise = jax.vmap(lambda k: jax.random.uniform(k, shape))(keys)
    return constrain(noise, "batch", *(None,) * len(shape))


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """bool[...]: which tokens are among ``eos_ids``."""
    ended = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        ended |= tokens == eos
    return ended


def _sample(
    noise: jax.Array,
    scores: jax.Array,
    top_p: float | jax.Array | None,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    ids = None
    if top_k or top_p is not None:
        count = top_k or scores.shape[-1]
        # Rows are where the draws are, each with all of its ids.
        scores, ids = top_k_of(scores, count, "draws", None)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    scores = scores - jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores)
    if top_p is not None:
        # A token stays while the likelier ones do not reach top_p alone; the
        # likeliest always stays.
        reached = jnp.cumsum(weights, axis=-1) - weights
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = jnp.where(reached < top_p * total, weights, 0.0)
    index = _invert(noise, weights)[..., None]
    tiny = jnp.finfo(jnp.float32).tiny
    total = jnp.maximum(jnp.sum(weights, axis=-1), tiny)
    logp = jnp.take_along_axis(scores, index, axis=-1)[..., 0] - jnp.log(total)
    if ids is not None:
        index = jnp.take_along_axis(ids, index, axis=-1)
    return index[..., 0].astype(jnp.int32), logp


def _invert(noise: jax.Array, weights: jax.Array) -> jax.Array:
    """i32[...]: an index with probability in proportion to its weight."""
    size = weights.shape[-1]
    if size <= _SINGLE_BLOCK:
        return _invert_once(noise[..., 0], weights)
    width = 2 ** math.ceil(math.log2(size) / 2)
    pad = [(0, 0)] * (weights.ndim - 1) + [(0, -size % width)]
    blocks = jnp.pad(weights, pad).reshape(*weights.shape[:-1], -1, width)
    which = _invert_once(noise[..., 0], jnp.sum(blocks, axis=-1))
    block = jnp.take_along_axis(blocks, which[..., None, None], axis=-2)
    inside = _invert_once(noise[..., 1], block[..., 0, :])
    return which * width + inside


def _invert_once(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    size = weights.shape[-1]
    upper = jnp.cumsum(weights, axis=-1)
    target = uniform[..., None] * upper[..., -1:]
    index = jnp.arange(size, dtype=jnp.int32)
    # Sums made in parallel need not grow steadily: what has no weight is
    # ruled out by name, and the last that has some stands in for rounding.
    alive = weights > 0
    hit = jnp.where(alive & (upper > target), index, size).min(axis=-1)
    last = jnp.where(alive, index, 0).max(axis=-1)
    return jnp.where(hit < size, hit, last)


def _argmax(x: jax.Array) -> jax.Array:
    """i32[...]: two plain reductions vectorise on CPU, argmax does not."""
    size = x.shape[-1]
    peak = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.arange(size, dtype=jnp.int32)
    first = jnp.where(x == peak, index, size).min(axis=-1)
    return jnp.minimum(first, size - 1)  # a row of nan has no peak
