"""Masks, candidates and windows, written by hand."""

import jax.numpy as jnp
import numpy as np

from topd_jax.types import Candidates, Windows

T = 12


def row_mask(*lengths, columns=T):
    return jnp.arange(columns) < jnp.array(lengths)[:, None]


def candidates(*rows, slots=4):
    """Candidates at the given positions, one tuple a row."""
    positions = np.zeros((len(rows), slots), int)
    mask = np.zeros((len(rows), slots), bool)
    for i, row in enumerate(rows):
        positions[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Candidates(jnp.asarray(positions), jnp.asarray(mask))


def windows(tokens, lengths):
    tokens = jnp.asarray(tokens)
    mask = jnp.arange(tokens.shape[-1]) < jnp.asarray(lengths)[..., None]
    return Windows(tokens, mask)
