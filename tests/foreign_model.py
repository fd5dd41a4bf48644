"""A language model that this project did not write, in ten lines of Flax."""

import jax
import jax.numpy as jnp
from conftest import VOCAB
from flax import linen as nn

from topd_jax.models import from_function


class Foreign(nn.Module):
    @nn.compact
    def __call__(self, tokens, positions, mask):
        x = nn.Embed(VOCAB, 12, name="words")(tokens)
        x += nn.Embed(64, 12, name="places")(positions)
        for _ in range(2):
            attend = nn.MultiHeadDotProductAttention(2)
            x += attend(nn.LayerNorm()(x), mask=mask[:, None])
            x += nn.Dense(12)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


def apply(params, tokens, positions, mask, cache):
    return Foreign().apply(params, tokens, positions, mask), None


def words(params):
    return params["params"]["words"]["embedding"]


def init_params(seed: int):
    ids = jnp.zeros((1, 2), jnp.int32)
    mask = jnp.ones((1, 2, 2), bool)
    return jax.jit(Foreign().init)(jax.random.key(seed), ids, ids, mask)


def make_foreign(seed: int = 0, **options):
    return from_function(apply, init_params(seed), head=words, **options)
