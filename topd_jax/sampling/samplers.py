"""Draw one token per row: temperature, top-k, top-p.

Tokens are drawn by inverting the cumulative distribution, which needs two
uniform numbers per row. The usual Gumbel noise needs one per vocabulary entry,
and on CPU costs more than a small model. The vocabulary is cut into blocks of
about its square root: the first number picks a block, the second a token
inside it. The probability of a token is the product of the two, so the draw is
exact, and rare tokens of large vocabularies keep their odds (one 24-bit number
could not tell 150,000 of them apart). The paper names no sampler.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp

from topd_jax.parallel.collectives import top_k as top_k_of
from topd_jax.parallel.sharding import constrain_rows

MAX_TEMPERATURE = 1e3

# Up to this many entries one cumulative sum is cheaper than two.
_SINGLE_BLOCK = 256


def check_sampler(
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    top_k: int = 0,
    *,
    vocab_size: int | None = None,
    **counts: int,
) -> None:
    """Refuse settings that mean nothing; traced values pass.

    Args:
      temperature: 0 (greedy) to 1000.
      top_p: above 0, at most 1 (off).
      top_k: 0 (off) or above.
      vocab_size: V, the bound of ``top_k``, where it is known.
      **counts: other settings, by name, that are integers of at least 1.

    Raises:
      ValueError: with the value, its bound and a way out.
    """
    if not isinstance(temperature, jax.core.Tracer):
        value = float(temperature)
        if not 0 <= value <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={value} must lie in 0 (greedy).."
                f"{MAX_TEMPERATURE:g}; 1 samples from the model itself"
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
    for name, value in counts.items():
        if operator.index(value) < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def choose(
    noise: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array,
    top_p: float | jax.Array | None,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row from given uniform numbers.

    ``softmax(logits / temperature)``, cut to the ``top_k`` likeliest tokens,
    then to the smallest set of likeliest ones whose share of what is left
    reaches ``top_p`` (Holtzman et al., 1904.09751); ties go to the lower id.

    Args:
      noise: f32[..., 2] uniform in [0, 1).
      logits: f32[..., V]; -inf forbids a token.
      temperature: 0 takes the likeliest token; may be traced.
      top_p: None compiles without it; may be traced otherwise.
      top_k: static; 0 compiles without it.

    Returns:
      (tokens i32[...], logp f32[...]): the log-probability of each token
      under the distribution that it was drawn from; 0 where greedy.
    """
    temperature = jnp.asarray(temperature, jnp.float32)

    def greedy(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _argmax(logits), jnp.zeros(logits.shape[:-1], jnp.float32)

    def sampled(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits / jnp.where(temperature > 0, temperature, 1.0)
        return _sample(noise, scores, top_p, top_k)

    return jax.lax.cond(temperature > 0, sampled, greedy, noise)


def row_noise(
    key: jax.Array, rows: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Draw uniform numbers that depend on the key and their row alone.

    Args:
      key: PRNG key.
      rows: i32[B] number of each row.
      shape: of each row's numbers.

    Returns:
      f32[B, *shape] in [0, 1).
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
        rows.astype(jnp.uint32)
    )
    noise = jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32))(keys)
    return constrain_rows(noise)


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
    """Return indices i32[...], drawn in proportion to their weights."""
    if weights.shape[-1] <= _SINGLE_BLOCK:
        return _invert_once(noise[..., 0], weights)
    blocks = _blocks(weights, 0.0)
    which = _invert_once(noise[..., 0], jnp.sum(blocks, axis=-1))
    inside = _invert_once(noise[..., 1], _take(blocks, which))
    return which * blocks.shape[-1] + inside


def _blocks(x: jax.Array, empty: float) -> jax.Array:
    """Cut [..., V] into blocks of about its square root, [..., N, W]."""
    size = x.shape[-1]
    width = 2 ** math.ceil(math.log2(size) / 2)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -size % width)]
    x = jnp.pad(x, pad, constant_values=empty)
    return x.reshape(*x.shape[:-1], -1, width)


def _take(blocks: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.take_along_axis(blocks, which[..., None, None], axis=-2)[
        ..., 0, :
    ]


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
    """Return i32[...]: the block of the peak, then its place in there.

    All of x is read once. On CPU XLA's own argmax does not vectorize.
    """
    size = x.shape[-1]
    if size <= _SINGLE_BLOCK:
        return _first_peak(x)
    blocks = _blocks(x, -jnp.inf)
    which = _first_peak(jnp.max(blocks, axis=-1))
    inside = _first_peak(_take(blocks, which))
    return jnp.minimum(which * blocks.shape[-1] + inside, size - 1)


def _first_peak(x: jax.Array) -> jax.Array:
    size = x.shape[-1]
    peak = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.arange(size, dtype=jnp.int32)
    first = jnp.where(x == peak, index, size).min(axis=-1)
    return jnp.minimum(first, size - 1)  # a row of nan has no peak
