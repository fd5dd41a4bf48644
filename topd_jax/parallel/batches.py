"""Put batches of rows from the host on a mesh."""

import jax
from jax.sharding import Mesh

from topd_jax.parallel.sharding import batch_shardings


def spread_rows(batch: object, mesh: Mesh) -> object:
    """Put a batch that every process holds whole on the mesh, by rows.

    Args:
      batch: a tree of host arrays [B, ...], the same in every process.
      mesh: from :func:`make_mesh`.

    Returns:
      The tree on the mesh.

    Raises:
      ValueError: where the rows do not divide over the mesh.
    """
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(
            x.shape, where, lambda index: x[index]
        ),
        batch,
        batch_shardings(batch, mesh),
    )
