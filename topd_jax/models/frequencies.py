"""Frequencies of rotary positions, and how they are stretched."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to longer contexts.

    Attributes:
      kind: "linear", "llama3", "yarn" or "longrope".
      factor: low frequencies are divided by it; "longrope": how much longer
        than original_length rows may be.
      original_length: tokens that the model was first trained on.
      low_freq_factor: "llama3": wavelengths above original_length / this are
        stretched whole.
      high_freq_factor: "llama3": wavelengths below original_length / this
        are left alone.
      beta_fast: "yarn": pairs that turn more often than this are left alone.
      beta_slow: "yarn": pairs that turn less often are stretched whole.
      attention_factor: "yarn", "longrope": multiplies cosine and sine.
      query_beta: "yarn": the query at position p is multiplied by 1 + this *
        log(1 + floor(p / original_length)) (Ministral 3).
      truncate: "yarn": the two borders are rounded to whole pairs.
      short_factors: "longrope" (arXiv:2402.13753): what each pair's frequency
        is divided by, where no row is longer than original_length.
      long_factors: the same for a decoder that reads longer rows.
    """

    kind: str
    factor: float
    original_length: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    query_beta: float = 0.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn", "longrope"):
            raise ValueError(
                f"kind={self.kind!r} must be 'linear', 'llama3', 'yarn' or "
                "'longrope'"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and low >= high:
            raise ValueError(
                f"low_freq_factor={low:g} must be below "
                f"high_freq_factor={high:g}"
            )

    def check_pairs(self, count: int) -> None:
        """Refuse lists of "longrope" that are not for ``count`` pairs."""
        pairs = len(self.short_factors), len(self.long_factors)
        if self.kind == "longrope" and set(pairs) != {count}:
            raise ValueError(
                f"rotary_dim={2 * count} turns {count} pairs, and the short "
                f"and long factors are for {pairs[0]} and {pairs[1]}"
            )


def frequencies(
    theta: float,
    head_dim: int,
    scaling: RopeScaling | None = None,
    long: bool = False,
) -> np.ndarray:
    """Return the angle per position of every rotary pair.

    Each operation rounds to float32, in the order of the code that the public
    checkpoints were trained with: the error of a last bit grows with the
    position.

    Args:
      theta: base; pair i turns by theta ** (-2 i / head_dim).
      head_dim: of which half are pairs.
      scaling: how long wavelengths are stretched.
      long: by the long factors of "longrope".

    Returns:
      f32[head_dim / 2].
    """
    plain = 1 / _base_powers(theta, head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(plain, theta, head_dim, scaling)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if long else scaling.short_factors
        powers = _base_powers(theta, head_dim)
        return 1 / (np.asarray(factors, np.float32) * powers)
    return plain / scaling.factor


def _base_powers(theta: float, head_dim: int) -> np.ndarray:
    """Return theta ** (2 i / head_dim), f32[head_dim / 2]."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    # Rounded once: of powers in float32 every library has its own last bit.
    return (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch where few turns fit the original length (Llama 3.1)."""
    length, factor = scaling.original_length, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = 1 / plain * (2 * math.pi)
    share = (1 / waves * length - low) / (high - low)
    mixed = (1 - share) * plain / factor + share * plain
    stretched = np.where(waves > length / low, plain / factor, mixed)
    return np.where(waves < length / high, plain, stretched)


def _yarn(
    plain: np.ndarray, theta: float, head_dim: int, scaling: RopeScaling
) -> np.ndarray:
    """Stretch by a ramp over pairs (YaRN, arXiv:2309.00071, §3.2)."""

    def border(turns: float) -> float:
        length = scaling.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    first, last = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 1e-3
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - first) / (last - first), 0, 1)
    stretched = 1 / (scaling.factor * _base_powers(theta, head_dim))
    return stretched * (1 - keep) + plain * keep
