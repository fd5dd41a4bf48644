"""A hash of a model: its shape and every bit of its parameters."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.decoder import Decoder
from topd_jax.parallel.hosts import on_host


def fingerprint(model: Any) -> str:
    """Hash a decoder's config and every bit of its parameters.

    Each element's bits are mixed with its index and added up as integers
    modulo 2**32, so the sum does not depend on the order of addition: the
    same on any mesh. ``remat``, ``unroll`` and the rows' length do not count,
    nor do options at their default: one that is added later changes none.

    Args:
      model: any decoder; of another model the parameters alone are hashed,
        by the path of each in the pytree, and not the function.

    Returns:
      64 hexadecimal digits.
    """
    fields, arrays = {}, {"": model}
    if isinstance(model, Decoder):
        config, arrays = model.config, model.arrays
        fields = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("remat", "unroll", "attention", "long_rope")
            and getattr(config, field.name) != field.default
        }
    digest = hashlib.sha256(
        json.dumps(fields, sort_keys=True, default=_fields).encode()
    )
    parts = {  # a quantized matrix is two arrays
        f"{name}{jax.tree_util.keystr(path)}{x.shape}{x.dtype}": x
        for name in sorted(arrays)
        for path, x in jax.tree_util.tree_leaves_with_path(arrays[name])
    }
    # Known to every process, also those without devices of the model's.
    sums = on_host(_bit_sums(list(parts.values())))
    for label, total in zip(parts, sums, strict=True):
        digest.update(label.encode())
        digest.update(total.astype("<u4").tobytes())
    return digest.hexdigest()


def _fields(option: Any) -> dict[str, Any]:
    """Leave out lists that only some kinds of an option have."""
    return {name: x for name, x in vars(option).items() if x != ()}


@jax.jit  # one program for all
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_bit_sum(x) for x in arrays]


def _bit_sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)  # nnx keeps that of its dropout
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype in (bool, jnp.int4):
        x = x.astype(jnp.int8)
    if x.dtype.itemsize == 8:  # as two numbers
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sizes = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    wide = sizes[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, wide).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * np.uint32(size) + place
    mixed = _mix(bits ^ _mix(index + np.uint32(0x9E3779B9)))
    again = _mix(mixed + np.uint32(0x85EBCA6B))
    sums = [jnp.sum(part, dtype=jnp.uint32) for part in (mixed, again)]
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """Apply the 32-bit finalizer of MurmurHash3 (Appleby): a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
