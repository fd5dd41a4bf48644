"""One decoder-only transformer, for every family that the config can spell.

Pre-norm RMSNorm, rotary positions, grouped-query attention, gated SiLU
feed-forward: Llama, SmolLM2 and Qwen3 (dense) differ by numbers and by the
optional norm over heads. One table, :func:`parameter_table`, names each
parameter with its shape, logical axes and initialiser; layers are stacked on a
leading axis and scanned, so compile time does not grow with depth.

A model is a Flax nnx module used as a plain pytree of arrays: it goes through
``jax.jit``, ``jax.grad`` and ``jax.eval_shape`` as it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from topd_jax.models.config import DecoderConfig
from topd_jax.models.layers import Cache, embed, layer, rms_norm, rope_table
from topd_jax.sharding import constrain


class Parameter(NamedTuple):
    """One row of the parameter table; ``scale`` None initialises to ones."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None


def parameter_table(config: DecoderConfig) -> dict[str, Parameter]:
    """Names, shapes, logical axes and initial scales of all parameters.

    Args:
      config: the decoder's shape.

    Returns:
      name -> row; names of layer parameters have "layers" as first axis.
    """
    n, d, f = config.layers, config.width, config.mlp_width
    h, kv, hd = config.heads, config.kv_heads, config.head_dim
    # Norm vectors are small; spreading them would cost more than it saves.
    norm = Parameter((n, d), ("layers", None), None)
    head_norm = Parameter((n, hd), ("layers", None), None)
    vocab = Parameter((config.vocab_size, d), ("vocab", "embed"), d**-0.5)
    query = Parameter(
        (n, d, h, hd), ("layers", "embed", "heads", "head_dim"), d**-0.5
    )
    key = Parameter(
        (n, d, kv, hd), ("layers", "embed", "kv_heads", "head_dim"), d**-0.5
    )
    out_axes = ("layers", "heads", "head_dim", "embed")
    wide = Parameter((n, d, f), ("layers", "embed", "mlp"), d**-0.5)
    table = {
        "embedding": vocab,
        "attention_norm": norm,
        "q": query,
        "k": key,
        "v": key,
        "o": Parameter((n, h, hd, d), out_axes, (h * hd) ** -0.5),
        "mlp_norm": norm,
        "gate": wide,
        "up": wide,
        "down": Parameter((n, f, d), ("layers", "mlp", "embed"), f**-0.5),
        "final_norm": Parameter((d,), (None,), None),
    }
    if config.qk_norm:
        table |= {"q_norm": head_norm, "k_norm": head_norm}
    if not config.tied:
        table["output"] = vocab
    return table


class Layers(nnx.Module):
    """The stacked parameters of all layers, one attribute a name."""

    def __init__(self, arrays: dict[str, jax.Array]) -> None:
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))


class Decoder(nnx.Module):
    """The parameters of a decoder, and its forward pass.

    Attributes:
      config: static shape.
      layers: parameters stacked over layers.
      embedding: nnx.Param [V, D]; final_norm; output where not tied.
    """

    def __init__(
        self, config: DecoderConfig, arrays: dict[str, jax.Array]
    ) -> None:
        """Holds the arrays that :func:`parameter_table` names.

        Args:
          config: the decoder's shape.
          arrays: name -> array, exactly the table's names and shapes.

        Raises:
          ValueError: naming every missing, extra or misshaped array.
        """
        _check(config, arrays)
        table = parameter_table(config)
        stacked = {n for n, row in table.items() if row.axes[0] == "layers"}
        self.config = config
        self.layers = Layers({n: arrays[n] for n in table if n in stacked})
        for name in table:
            if name not in stacked:
                setattr(self, name, nnx.Param(arrays[name]))

    @property
    def head(self) -> jax.Array:
        """[V, D] output head; the embedding where they are tied."""
        return (self.embedding if self.config.tied else self.output)[...]

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Parameter name -> array: what the constructor was given."""
        held = vars(self.layers) | vars(self)
        return {n: held[n][...] for n in parameter_table(self.config)}

    @property
    def logical_axes(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> logical axes, for sharding."""
        return {n: row.axes for n, row in parameter_table(self.config).items()}

    def init_cache(self, batch: int, columns: int) -> Cache:
        """An empty cache of ``columns`` columns in the compute dtype."""
        c = self.config
        shape = (c.layers, batch, columns, c.kv_heads, c.head_dim)
        zeros = constrain(
            jnp.zeros(shape, c.dtype),
            None, "batch", None, "activation_kv_heads", None,
        )  # fmt: skip
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Reads tokens and returns the states that predict the next ones.

        Args:
          tokens: i32[B, S].
          positions: i32[B, S] rotary positions.
          mask: bool[B, S, L] which columns each token attends to; L == S
            without a cache, else all columns of the cache.
          cache: where to write the S new columns; None attends to the S
            tokens alone.

        Returns:
          (hidden [B, S, D] after the final norm in compute dtype, the cache
          with ``length`` grown by S, or None).
        """
        c = self.config
        hidden = embed(self.embedding[...], tokens, c)
        rope = rope_table(positions, c)
        body = _rematerialised(
            functools.partial(layer, c, rope=rope, mask=mask[:, None]), c
        )
        index = jnp.arange(c.layers)
        (hidden, cache), _ = jax.lax.scan(
            lambda carry, x: (body(carry, *x), None),
            (hidden, cache),
            (self.layers, index),
            unroll=min(c.unroll, c.layers),
        )
        if cache is not None:
            cache = cache.replace(length=cache.length + tokens.shape[1])
        return rms_norm(hidden, self.final_norm[...], c.norm_eps), cache


def init_decoder(config: DecoderConfig, key: jax.Array) -> Decoder:
    """A randomly initialised decoder.

    Args:
      config: the decoder's shape.
      key: PRNG key.

    Returns:
      The model: normal weights of standard deviation fan_in ** -0.5, unit
      norms, in ``config.param_dtype``.
    """
    table = parameter_table(config)
    keys = jax.random.split(key, len(table))
    arrays = {}
    for k, (name, row) in zip(keys, table.items(), strict=True):
        if row.scale is None:
            arrays[name] = jnp.ones(row.shape, config.param_dtype)
        else:
            noise = jax.random.normal(k, row.shape, jnp.float32) * row.scale
            arrays[name] = noise.astype(config.param_dtype)
    return Decoder(config, arrays)


def unembed(head: jax.Array, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states.

    Args:
      head: [V, D] output head.
      hidden: [..., D] final hidden states.

    Returns:
      f32[..., V] raw logits, accumulated in float32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = jax.lax.dot_general(
        flat,
        head.astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return logits.reshape(*hidden.shape[:-1], head.shape[0])


def causal_mask(mask: jax.Array) -> jax.Array:
    """Which earlier columns each column attends to.

    Args:
      mask: bool[B, L] which columns exist.

    Returns:
      bool[B, L, L]: row attends to column; existing columns not after it.
    """
    length = mask.shape[-1]
    order = jnp.arange(length)
    return (order[:, None] >= order[None, :]) & mask[:, None, :]


def cast(model: Decoder, dtype: str) -> Decoder:
    """The same model with its parameters kept, and computed, in ``dtype``.

    Args:
      model: any decoder.
      dtype: "float32" or "bfloat16".

    Returns:
      A new model; used to sample in bf16 from fp32 master weights without a
      cast at every token.
    """
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
    if config == model.config:
        return model
    arrays = {n: x.astype(dtype) for n, x in model.arrays.items()}
    return Decoder(config, arrays)


def _check(config: DecoderConfig, arrays: dict[str, jax.Array]) -> None:
    table = parameter_table(config)
    missing = sorted(set(table) - set(arrays))
    extra = sorted(set(arrays) - set(table))
    shapes = [
        f"{n} {tuple(arrays[n].shape)}, not {table[n].shape}"
        for n in table
        if n in arrays and tuple(arrays[n].shape) != table[n].shape
    ]
    if missing or extra or shapes:
        raise ValueError(
            f"the arrays do not fit the config: missing {missing}, extra "
            f"{extra}, misshaped {shapes}"
        )


def _rematerialised(body: Callable, config: DecoderConfig) -> Callable:
    if config.remat == "none":
        return body
    policy = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[config.remat]
    return jax.checkpoint(body, policy=policy)
