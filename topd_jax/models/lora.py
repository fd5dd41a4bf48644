"""Low-rank adapters: what of a model is trained, and merging it away.

``x W + scale * (x A) B`` with W frozen (LoRA, arXiv:2106.09685). The factors
are rows of the parameter table like any other, so a model with adapters is
sharded, scanned, sampled from and fingerprinted as one without.

A training step takes a model apart into what is trained and what is not
(:func:`split`), differentiates the one and passes the other by
(:func:`join`). Where there are no adapters, or the model is no decoder,
everything is trained.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import Decoder
from topd_jax.models.fingerprint import fingerprint
from topd_jax.models.parameters import (
    LORA_A,
    LORA_B,
    is_quantized,
    parameter_shardings,
    parameter_table,
)


class Adapters(nnx.Module):
    """The adapters of a decoder alone: what a LoRA student trains.

    Attributes:
      lora: static shape.
      q_lora_a: and so on, a parameter an attribute, as the table names it.
    """

    def __init__(self, lora: Lora, arrays: Mapping[str, jax.Array]) -> None:
        """Hold the arrays of the adapters.

        Args:
          lora: their shape.
          arrays: name -> array, [N, in..., r] or [N, r, out...].
        """
        self.lora = lora
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Return parameter name -> array: what the constructor was given."""
        return {n: vars(self)[n][...] for n in _names(self.lora)}


def split(model: Any) -> tuple[Any, Any]:
    """Split a model into what is trained and what is not.

    Args:
      model: a decoder, or any other pytree.

    Returns:
      (:class:`Adapters`, the decoder without them); (model, None) where
      everything is trained. No array is copied.
    """
    if not isinstance(model, Decoder) or model.config.lora is None:
        return model, None
    arrays = model.arrays
    names = _names(model.config.lora)
    factors = {n: arrays.pop(n) for n in names}
    config = model.config.replace(lora=None)
    return Adapters(model.config.lora, factors), Decoder(config, arrays)


def join(trained: Any, frozen: Any) -> Any:
    """Invert :func:`split`.

    Args:
      trained: the adapters, or a whole model.
      frozen: the decoder without adapters, or None.

    Returns:
      The model.
    """
    if frozen is None:
        return trained
    config = frozen.config.replace(lora=trained.lora)
    return Decoder(config, frozen.arrays | trained.arrays)


def add_lora(
    model: Decoder, lora: Lora, *, mesh: Mesh | None = None
) -> Decoder:
    """Put adapters beside a decoder's linear maps.

    Args:
      model: a decoder without adapters; its arrays are not copied.
      lora: shape of the adapters. A is drawn as the parameter table says,
        always the same numbers, and B is zero: the model computes what it
        did before.
      mesh: where to spread them; None is one device.

    Returns:
      The model with adapters, float32 whatever the other parameters are:
      they are few, and their updates are small.

    Raises:
      ValueError: where the model has adapters already, or ``lora`` or a mesh
        axis does not fit it.
    """
    config = adapted_config(model, lora)
    table = parameter_table(config)
    shardings = parameter_shardings(config, mesh)
    # NumPy: the same numbers whatever the devices, in every process.
    draw = np.random.default_rng(0)
    placed = {}
    for name in _names(lora):
        row = table[name]
        host = np.full(row.shape, row.start, np.float32)
        if row.scale is not None:
            host = draw.standard_normal(row.shape, np.float32) * row.scale
            host = host.astype(np.float32)
        if (sharding := shardings[name]) is None:
            placed[name] = jnp.asarray(host)
        else:
            placed[name] = jax.make_array_from_callback(
                host.shape, sharding, lambda index, host=host: host[index]
            )
    return Decoder(config, model.arrays | placed)


def adapted_config(model: Decoder, lora: Lora) -> DecoderConfig:
    """Return the shape of a model once it has adapters.

    Args:
      model: a decoder without adapters.
      lora: shape of the adapters.

    Raises:
      ValueError: where it has adapters already, or ``lora`` does not fit it.
    """
    if model.config.lora is not None:
        raise ValueError(
            f"the model has adapters already ({model.config.lora}); merge "
            "them first"
        )
    return model.config.replace(lora=lora)


def merge_lora(model: Any, *, donate: bool = False) -> Any:
    """Merge adapters: W + scale * A B in W's place.

    Computed in float32, kept in W's dtype. Inside a jitted rollout this is
    made once, before the loop over tokens, and costs the memory of the linear
    maps that have an adapter once more while the rollout lasts. Quantized
    maps keep their adapters beside them: merged, they would be floats again.

    Args:
      model: any model.
      donate: give up its arrays, one parameter at a time, so that no second
        copy of them is ever held; not inside a jitted function.

    Returns:
      A decoder without adapters; ``model`` itself where it has none, or is
      quantized.
    """
    adapters, base = split(model)
    if base is None or any(map(is_quantized, base.arrays.values())):
        return model
    arrays, low = base.arrays, adapters.arrays
    for name in adapters.lora.targets:
        w = arrays[name]
        one = functools.partial(_merged, scale=adapters.lora.scale)
        if donate:
            one = jax.jit(one, donate_argnums=0, out_shardings=w.sharding)
        arrays[name] = one(w, low[name + LORA_A], low[name + LORA_B])
    return Decoder(base.config, arrays)


def frozen_fingerprint(model: Any) -> str:
    """Hash what is not trained, and the adapters' shape and scale.

    Args:
      model: any model.

    Returns:
      64 hexadecimal digits; "" where everything is trained.
    """
    adapters, base = split(model)
    if base is None:
        return ""
    text = f"{fingerprint(base)} {adapters.lora}"
    return hashlib.sha256(text.encode()).hexdigest()


def _names(lora: Lora) -> list[str]:
    return [t + suffix for t in lora.targets for suffix in (LORA_A, LORA_B)]


def _merged(
    w: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
    layers, rank = a.shape[0], a.shape[-1]
    product = jnp.matmul(
        a.reshape(layers, -1, rank),
        b.reshape(layers, rank, -1),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    wide = w.astype(jnp.float32) + scale * product.reshape(w.shape)
    return wide.astype(w.dtype)
