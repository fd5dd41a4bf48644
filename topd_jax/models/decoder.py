"""One decoder-only transformer, for every family that the config can spell.

RMSNorm, rotary positions, grouped-query attention, a gated feed-forward layer
or a mixture of them: families differ by the options of their config. One
table, :func:`~topd_jax.models.parameters.parameter_table`, names each
parameter with its shape, logical axes and initialiser; layers are stacked on a
leading axis and scanned, and what they differ in is scanned with them, so
compile time does not grow with depth.

A model is a Flax nnx module used as a plain pytree of arrays: it goes through
``jax.jit``, ``jax.grad`` and ``jax.eval_shape`` as it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from topd_jax.models.attention.core import Cache, look
from topd_jax.models.attention.masks import Branching, Mask, Spans, Written
from topd_jax.models.config import DecoderConfig
from topd_jax.models.layers import embed, layer, layer_options, rms_norm
from topd_jax.models.parameters import parameter_table
from topd_jax.models.quantization import is_quantized
from topd_jax.models.rope import rope_table
from topd_jax.parallel.sharding import constrain
from topd_jax.types import CappedHead, Head, head_cap, head_rows, soft_cap


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
          arrays: name -> array, exactly the table's names and shapes; the
            large matrices of a frozen model may be quantised
            (:mod:`topd_jax.models.quantization`).

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
    def head(self) -> Head:
        """[V, D] output head; the embedding where they are tied.

        Where the config bounds the logits the head says so itself; see
        :mod:`topd_jax.types`.
        """
        rows = (self.embedding if self.config.tied else self.output)[...]
        cap = self.config.final_softcap
        return rows if cap is None else CappedHead(rows, cap)

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
        positions = None
        if any(c.sliding):
            positions = jnp.zeros((1, batch, columns), jnp.int32)
            positions = constrain(positions, None, "batch", None)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32), positions)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Reads tokens and returns the states that predict the next ones.

        Args:
          tokens: i32[B, S].
          positions: i32[B, S] rotary positions.
          mask: bool[B, S, L] which columns each token attends to; L == S
            without a cache, else all columns of the cache. As spans it is
            never made whole where sequences are long, nor for branches.
          cache: where to write the S new columns; None attends to the S
            tokens alone.

        Returns:
          (hidden [B, S, D] after the final norm in compute dtype, the cache
          with ``length`` grown by S, or None).
        """
        c = self.config
        hidden = embed(self.embedding[...], tokens, c)
        scanned, stacks = split_stacks(self)
        sight, cache = look(c, positions, mask, cache)
        rope = rope_table(positions, c)
        body = functools.partial(layer, c, rope=rope, sight=sight)
        body = _rematerialised(body, c)
        options = jax.tree.map(jnp.asarray, layer_options(c))
        (hidden, cache), _ = jax.lax.scan(
            lambda carry, x: (body(carry, *x, stacks=stacks), None),
            (hidden, cache),
            (scanned, options),
            unroll=min(c.unroll, c.layers),
        )
        if cache is not None:
            cache = cache.replace(length=cache.length + tokens.shape[1])
        return rms_norm(hidden, self.final_norm[...], c), cache


def split_stacks(
    model: Decoder,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Layer parameters to scan, and those of which only some layers have one.

    Args:
      model: any decoder.

    Returns:
      (name -> [N, ...], name -> [fewer, ...]); the second is empty unless
      some layers have experts and others have not.
    """
    arrays = {n: p[...] for n, p in vars(model.layers).items()
              if isinstance(p, nnx.Variable)}  # fmt: skip
    mixed = set()
    if model.config.expert_layers and model.config.dense_layers:
        mixed = {
            n for n, x in arrays.items() if x.shape[0] < model.config.layers
        }
    scanned = {n: x for n, x in arrays.items() if n not in mixed}
    return scanned, {n: arrays[n] for n in mixed}


def init_decoder(config: DecoderConfig, key: jax.Array) -> Decoder:
    """A randomly initialised decoder.

    Args:
      config: the decoder's shape.
      key: PRNG key.

    Returns:
      The model: normal weights of standard deviation fan_in ** -0.5, norms
      that scale by one and biases of zero, in ``config.param_dtype``.
    """
    table = parameter_table(config)
    keys = jax.random.split(key, len(table))
    arrays = {}
    for k, (name, row) in zip(keys, table.items(), strict=True):
        if row.scale is None:
            arrays[name] = jnp.full(row.shape, row.start, config.param_dtype)
        else:
            noise = jax.random.normal(k, row.shape, jnp.float32) * row.scale
            arrays[name] = noise.astype(config.param_dtype)
    return Decoder(config, arrays)


def unembed(head: Head, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states.

    Args:
      head: [V, D] output head.
      hidden: [..., D] final hidden states.

    Returns:
      f32[..., V] raw logits, accumulated in float32, bounded where the head
      says so.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = jax.lax.dot_general(
        flat,
        head_rows(head).astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    logits = soft_cap(logits, head_cap(head))
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


def mask_for(model: Any, spans: Spans | Branching | Written) -> Mask:
    """What a model takes as its mask.

    Args:
      model: any :class:`~topd_jax.models.protocol.LanguageModel`.
      spans: what its tokens shall see, or what is written.

    Returns:
      The same for a decoder; for another model bool[B, S, L].
    """
    return spans if isinstance(model, Decoder) else spans.dense()


def cast(model: Decoder, dtype: str) -> Decoder:
    """The same model with its parameters kept, and computed, in ``dtype``.

    Args:
      model: any decoder.
      dtype: "float32" or "bfloat16".

    Returns:
      A new model; used to sample in bf16 from fp32 master weights without a
      cast at every token. Quantised matrices stay as they are.
    """
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
    if config == model.config:
        return model
    arrays = {
        n: x if is_quantized(x) else x.astype(dtype)
        for n, x in model.arrays.items()
    }
    return Decoder(config, arrays)


def in_compute_dtype(model: Any) -> Any:
    """The model that a sampler should run.

    Args:
      model: any :class:`~topd_jax.models.protocol.LanguageModel`.

    Returns:
      A decoder with its parameters in its compute dtype; another model as it
      is.
    """
    if not isinstance(model, Decoder):
        return model
    return cast(model, model.config.dtype)


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
