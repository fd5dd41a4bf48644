"""Rows times the matrix of their group: megablox on TPU, ragged_dot elsewhere.

Rows are sorted by group; rows behind the last group belong to none and give
zeros. On TPU the kernel of MegaBlocks (Gale et al., arXiv:2211.15841) that JAX
carries, ``jax.experimental.pallas.ops.tpu.megablox``, visits only the tiles
that hold rows of a group; its gradients are the same kernels. The choice is
made when the program is lowered, so one trace serves both platforms.

XLA itself expands ``ragged_dot`` for TPU into a product of every row with the
matrices of all groups: compiled for v5e with 32 of Qwen3-30B-A3B's experts a
device, a layer's forward pass costs 9.7e9 operations a device that way, and
3.0e8 here (``tests/tpu_kernels.py``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Rows, inputs and outputs of a tile; at most 6 MB of a core's 16 MB of fast
# memory in f32, double buffers and the accumulator included.
_TILE = (256, 512, 512)
_LANES = 16  # rows of a tile must be a multiple of it (bf16)


@jax.custom_vjp
def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Compute ``x[rows of group g] @ w[g]`` for every group g.

    Args:
      x: [R, I], rows sorted by group.
      w: [G, I, O], in x's dtype.
      sizes: i32[G] rows of each group, some may be 0; their sum is at most R.

    Returns:
      [R, O] in x's dtype, zero in rows behind the last group.
    """
    return jax.lax.platform_dependent(
        x, w, sizes, tpu=megablox, default=jax.lax.ragged_dot
    )


def _forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple:
    return grouped_dot(x, w, sizes), (x, w, sizes)


def _backward(saved: tuple, cotangent: jax.Array) -> tuple:
    dx, dw = jax.lax.platform_dependent(
        *saved, cotangent, tpu=megablox_gradients, default=_ragged_gradients
    )
    return dx, dw, np.zeros(saved[2].shape, jax.dtypes.float0)


grouped_dot.defvjp(_forward, _backward)


def megablox(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Compute :func:`grouped_dot` by the TPU kernel.

    Args:
      x: [R, I].
      w: [G, I, O].
      sizes: i32[G].
      interpret: run the kernel without a TPU, slowly.

    Returns:
      [R, O].
    """
    rows, (x, sizes, tile) = x.shape[0], _padded(x, sizes)
    (inputs, outputs), kernel = w.shape[1:], _kernels()[0]
    # The last group has no matrix: the kernel fills its rows with zeros.
    return kernel(
        x, w, sizes, x.dtype, _tiling(tile, inputs, outputs),
        interpret=interpret,
    )[:rows]  # fmt: skip


def megablox_gradients(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    cotangent: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of :func:`grouped_dot` by the TPU kernels.

    Args:
      x: [R, I].
      w: [G, I, O].
      sizes: i32[G].
      cotangent: [R, O] gradient of the result.
      interpret: run the kernels without a TPU, slowly.

    Returns:
      (gradient of x, of w), in their dtypes.
    """
    rows, (x, all_sizes, tile) = x.shape[0], _padded(x, sizes)
    cotangent, _, _ = _padded(cotangent, sizes)
    (inputs, outputs), (gmm, tgmm) = w.shape[1:], _kernels()
    dx = gmm(
        cotangent, w, all_sizes, x.dtype, _tiling(tile, outputs, inputs),
        transpose_rhs=True, interpret=interpret,
    )[:rows]  # fmt: skip
    dw = tgmm(
        x.T, cotangent, all_sizes, w.dtype, _tiling(tile, inputs, outputs),
        num_actual_groups=w.shape[0], interpret=interpret,
    )  # fmt: skip
    return dx, dw


def _ragged_gradients(
    x: jax.Array, w: jax.Array, sizes: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    return jax.vjp(dot, x, w)[1](cotangent)


def _padded(x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Pad rows to whole tiles, and add a group for those of none."""
    tile = min(_TILE[0], -(-x.shape[0] // _LANES) * _LANES)
    x = jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
    rest = x.shape[0] - jnp.sum(sizes)
    return x, jnp.append(sizes, rest).astype(jnp.int32), tile


def _tiling(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    return rows, min(_TILE[1], inputs), min(_TILE[2], outputs)


def _kernels() -> tuple[Any, Any]:
    # Here, not above: Pallas takes a while to import, and dense models need
    # none of it.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm
