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
from collections.abc import Callable

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
        *saved,
        cotangent,
        tpu=functools.partial(_gradients, megablox),
        default=functools.partial(_gradients, jax.lax.ragged_dot),
    )
    return dx, dw, np.zeros(saved[2].shape, jax.dtypes.float0)


grouped_dot.defvjp(_forward, _backward)


def megablox(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Compute :func:`grouped_dot` by the TPU kernel, gradients too.

    Args:
      x: [R, I].
      w: [G, I, O].
      sizes: i32[G].
      interpret: run the kernel without a TPU, slowly.

    Returns:
      [R, O].
    """
    # Here, not above: Pallas takes a while to import, and dense models need
    # none of it.
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

    # Whole tiles, and a group for the rows of none. It has no matrix: the
    # kernel fills its rows with zeros.
    rows = x.shape[0]
    tile = min(_TILE[0], -(-rows // _LANES) * _LANES)
    x = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    rest = x.shape[0] - jnp.sum(sizes)
    sizes = jnp.append(sizes, rest).astype(jnp.int32)
    return gmm(
        x, w, sizes, x.dtype, _tiling, interpret=interpret
    )[:rows]  # fmt: skip


def _tiling(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    return min(_TILE[0], rows), min(_TILE[1], inputs), min(_TILE[2], outputs)


def _gradients(
    dot: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda x, w: dot(x, w, sizes), x, w)[1](cotangent)
