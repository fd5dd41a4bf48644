"""A frozen model in fewer bits: int8 or int4 weights, floats one layer a time.

Weight-only: the large matrices of the layers are kept as integers with scales,
``w ≈ q * s``, and become floats inside the scan over layers, one layer after
the other; nothing is kept twice. Norms, biases, routers, embedding and output
head stay floats. Symmetric round-to-nearest with the largest magnitude as
range, by the qwix library; no calibration data.

* int8: one f32 scale an output feature (vector-wise, Dettmers et al.,
  arXiv:2208.07339, §2.1).
* int4: a bf16 scale for every 32 inputs of an output feature, since four bits
  hold one outlier and little else (Dettmers & Zettlemoyer, arXiv:2212.09720,
  §2); 4.5 bits a weight, as in llama.cpp's Q4_0.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from topd_jax.models.config import DELTA_TARGETS, LORA_TARGETS
from topd_jax.models.decoder import Decoder
from topd_jax.models.parameters import as_floats, is_quantized, linear_inputs
from topd_jax.parallel.sharding import coarser

if TYPE_CHECKING:
    from qwix import QArray

KINDS = ("int8", "int4")
# Inputs that share a scale; 0: all of them.
_TILE = {"int8": 0, "int4": 32}
_SCALE_DTYPE = {"int8": jnp.float32, "int4": jnp.bfloat16}
_MATRICES = (
    *LORA_TARGETS,
    *DELTA_TARGETS,
    *(f"{kind}_{name}" for kind in ("expert", "shared")
      for name in ("gate", "up", "down")),
)  # fmt: skip


def quantizer(
    kind: str,
) -> "Callable[[str, jax.Array], jax.Array | QArray] | None":
    """Return what a loader does to each parameter once it is placed.

    Args:
      kind: "int8", "int4", or "" for nothing.

    Returns:
      (parameter, array) -> what the decoder holds instead; None for "".

    Raises:
      ValueError: for another kind.
    """
    if not kind:
        return None
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be {', '.join(KINDS)} or ''")
    return functools.partial(_quantize, kind=kind)


def quantize(model: Decoder, kind: str) -> Decoder:
    """Keep the matrices of a decoder's layers as integers.

    Args:
      model: any decoder of float parameters.
      kind: "int8", "int4", or "" for nothing.

    Returns:
      A decoder whose matrices are ``qwix.QArray``, spread as they were. It
      reads and writes as any other, but is not to be trained.

    Raises:
      ValueError: for another kind, or a model that is quantized already.
    """
    finish = quantizer(kind)
    if finish is None:
        return model
    require_floats(model, "quantize")
    arrays = {name: finish(name, x) for name, x in model.arrays.items()}
    return Decoder(model.config, arrays)


def dequantize(model: Decoder) -> Decoder:
    """Return the float decoder that a quantized one computes as.

    Args:
      model: any decoder.

    Returns:
      Its matrices in ``param_dtype``, whole; what was floats is as it was,
      float32 adapters too.
    """
    dtype = model.config.param_dtype
    arrays = {
        name: as_floats(x, dtype) if is_quantized(x) else x
        for name, x in model.arrays.items()
    }
    return Decoder(model.config, arrays)


def require_floats(model: Decoder, what: str) -> None:
    """Refuse a quantized model.

    Args:
      model: any decoder.
      what: could not be done with it, a verb.

    Raises:
      ValueError: with the way out.
    """
    if any(is_quantized(x) for x in model.arrays.values()):
        raise ValueError(
            f"cannot {what} a quantized model; load it without quantize, or "
            "call dequantize first"
        )


def _quantize(
    name: str, array: jax.Array, *, kind: str
) -> "jax.Array | QArray":
    if name not in _MATRICES:
        return array
    # The dimensions that the product sums over.
    first = 2 if name.startswith("expert_") else 1
    summed = range(first, first + linear_inputs(name))
    wanted, last, tiled = _TILE[kind], summed[-1], {}
    if wanted:
        # Heads, where the product sums over them too, have their own scales.
        # What does not divide a dimension is its largest divisor below.
        size = array.shape[last]
        tiled = {last: max(n for n in range(1, wanted + 1) if size % n == 0)}
        summed = (last,)
    channels = (i for i in range(array.ndim) if i not in summed)
    traced = isinstance(array, jax.core.Tracer)
    return _integers(
        array,
        kind=kind,
        channels=tuple(channels),
        tiled=tuple(tiled.items()),
        sharding=None if traced else array.sharding,
    )


@functools.partial(
    jax.jit, static_argnames=("kind", "channels", "tiled", "sharding")
)
def _integers(
    array: jax.Array,
    *,
    kind: str,
    channels: tuple[int, ...],
    tiled: tuple[tuple[int, int], ...],
    sharding: jax.sharding.Sharding | None,
) -> "QArray":
    import qwix

    small = qwix.quantize(
        array.astype(jnp.float32),  # else it would divide in bf16
        jnp.dtype(kind),
        channelwise_axes=channels,
        tiled_axes=dict(tiled),
        scale_dtype=_SCALE_DTYPE[kind],
    )
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return small
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(
            x, coarser(sharding, x.shape)
        ),
        small,
    )
