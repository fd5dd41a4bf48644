"""One decoder-only transformer, for every family that the config can spell.

RMSNorm, rotary positions, grouped-query attention, a gated feed-forward layer
or a mixture of them: families differ by the options of their config. One
table, :func:`~topd_jax.models.parameters.parameter_table`, names each
parameter with its shape, logical axes and initializer; layers are stacked on a
leading axis and scanned, and what they differ in is scanned with them, so
compile time does not grow with depth.

A model is a Flax nnx module used as a plain pytree of arrays: it goes through
``jax.jit``, ``jax.grad`` and ``jax.eval_shape`` as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from topd_jax.models.attention.cache import Cache
from topd_jax.models.attention.core import prepare_mask
from topd_jax.models.attention.masks import (
    BranchMask,
    CachedMask,
    IntervalMask,
    Mask,
    RolloutMask,
)
from topd_jax.models.config import DecoderConfig
from topd_jax.models.layers import embed, final_norm, layer, layer_options
from topd_jax.models.parameters import (
    arrays_of,
    is_quantized,
    layers_of,
    parameter_table,
    period_of,
)
from topd_jax.models.recurrence import empty_states
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

    reads_intervals = True  # see mask_for

    def __init__(
        self, config: DecoderConfig, arrays: dict[str, jax.Array]
    ) -> None:
        """Hold the arrays that :func:`parameter_table` names.

        Args:
          config: the decoder's shape.
          arrays: name -> array, exactly the table's names and shapes; the
            large matrices of a frozen model may be quantized
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
        """Return the output head [V, D]; the embedding where they are tied.

        Where the config bounds the logits the head says so itself; see
        :mod:`topd_jax.types`.
        """
        rows = (self.embedding if self.config.tied else self.output)[...]
        cap = self.config.final_softcap
        return rows if cap is None else CappedHead(rows, cap)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Return parameter name -> array: what the constructor was given."""
        held = vars(self.layers) | vars(self)
        return {n: held[n][...] for n in parameter_table(self.config)}

    @property
    def logical_axes(self) -> dict[str, tuple[str, ...]]:
        """Return parameter name -> logical axes, for sharding."""
        return {n: row.axes for n, row in parameter_table(self.config).items()}

    def init_cache(self, batch: int, length: int, branches: int = 0) -> Cache:
        """Make an empty cache of ``length`` tokens in the compute dtype.

        Args:
          batch: B rows.
          length: tokens that can be written.
          branches: M of every row, each with states of its own in the layers
            that are recurrent; 0: a row has one.
        """
        c = self.config
        attending = c.layers - sum(c.recurrent)
        shape = (attending, batch, c.kv_heads, length, c.head_dim)
        zeros = constrain(
            jnp.zeros(shape, c.dtype),
            None, "batch", "activation_kv_heads", None, None,
        )  # fmt: skip
        positions = None
        if any(c.sliding):
            positions = jnp.zeros((1, batch, length), jnp.int32)
            positions = constrain(positions, None, "batch", None)
        cache = Cache(zeros, zeros, jnp.zeros((), jnp.int32), positions)
        if not c.recurrent:
            return cache
        rows = (batch, branches) if branches else (batch,)
        count = sum(c.recurrent)
        states, inputs = (jnp.stack([x] * count) for x in empty_states(c, rows))
        return cache.replace(states=states, inputs=inputs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Read tokens and return the states that predict the next ones.

        Args:
          tokens: i32[B, S].
          positions: i32[B, S] rotary positions.
          mask: bool[B, S, L] which keys each token attends to; L == S without
            a cache, else its length. An
            :class:`~topd_jax.models.attention.masks.IntervalMask` is never
            expanded where sequences are long, nor is a mask of branches.
          cache: to which the S tokens are appended; None attends to the S
            tokens alone.

        Returns:
          (hidden [B, S, D] after the final norm in compute dtype, the cache
          with ``length`` grown by S, or None).

        Raises:
          ValueError: where tokens, positions and mask do not belong together.
        """
        check_call(tokens, positions, mask)
        c = self.config
        hidden = embed(self.embedding[...], tokens, c)
        spec, cache = prepare_mask(c, positions, mask, cache)
        rope = rope_table(positions, c)
        body = functools.partial(layer, c, rope=rope, spec=spec)
        body = _rematerialized(body, c)
        options = jax.tree.map(jnp.asarray, layer_options(c))
        stacks = layer_arrays(self), options
        length = period_of(c)
        if length > 1:
            stacks, body = _by_period(c, stacks, body)
        (hidden, cache), _ = jax.lax.scan(
            lambda carry, own: (body(carry, *own), None),
            (hidden, cache),
            stacks,
            unroll=min(max(c.unroll // length, 1), c.layers // length),
        )
        if cache is not None:
            cache = cache.replace(length=cache.length + tokens.shape[1])
        return final_norm(hidden, self.final_norm[...], c), cache


def _by_period(
    config: DecoderConfig, stacks: Any, body: Callable[..., Any]
) -> tuple[Any, Callable[..., Any]]:
    """Return stacks over periods, where kinds of layers repeat, and their body.

    XLA on a CPU copies stacks that are reshaped, at every token of a loop.
    """
    length = period_of(config)
    parts = config.layers // length

    def reshape(x: jax.Array) -> jax.Array:
        return x.reshape(parts, -1, *x.shape[1:])

    def period(carry: Any, arrays: dict[str, Any], options: Any) -> Any:
        for i in range(length):
            own = {name: x[i] for name, x in options.items()}
            carry = body(carry, arrays_of(config, arrays, i), own)
        return carry

    return jax.tree.map(reshape, stacks), period


def check_call(tokens: jax.Array, positions: jax.Array, mask: Mask) -> None:
    """Raise a ValueError where tokens, positions and mask do not fit."""
    shapes = {"tokens": tokens.shape, "positions": positions.shape}
    fits = tokens.ndim == 2 and positions.shape == tokens.shape
    if hasattr(mask, "shape"):
        shapes["mask"] = mask.shape
        fits &= len(mask.shape) == 3 and mask.shape[:2] == tokens.shape
    if not fits:
        raise ValueError(
            "a model reads tokens [B, S] at positions [B, S] with a mask "
            f"[B, S, L], not {shapes}; a single row has B=1"
        )


def layer_arrays(model: Decoder) -> dict[str, jax.Array]:
    """Return the parameters to scan: name -> [N, ...]."""
    return {
        name: param[...]
        for name, param in vars(model.layers).items()
        if isinstance(param, nnx.Variable)
    }


def init_decoder(config: DecoderConfig, key: jax.Array) -> Decoder:
    """Initialize a decoder at random.

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
    """Compute the logits of hidden states.

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


def mask_for(
    model: Any, mask: IntervalMask | BranchMask | CachedMask | RolloutMask
) -> Mask:
    """Return a mask in the form that a model takes.

    Args:
      model: any :class:`~topd_jax.models.protocol.LanguageModel`.
      mask: which keys its tokens attend to.

    Returns:
      The same for a decoder; for another model bool[B, S, L].
    """
    return mask if _is_decoder(model) else mask.dense()


def _is_decoder(model: Any) -> bool:
    """Tell whether a model is a decoder, its layers stacked or not."""
    return getattr(model, "reads_intervals", False)


def cast(model: Decoder, dtype: str) -> Decoder:
    """Keep, and compute with, a model's parameters in ``dtype``.

    Args:
      model: any decoder.
      dtype: "float32" or "bfloat16".

    Returns:
      A new model; used to sample in bf16 from fp32 master weights without a
      cast at every token. Quantized matrices stay as they are.
    """
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
    if config == model.config:
        return model
    arrays = {
        n: x if is_quantized(x) else x.astype(dtype)
        for n, x in model.arrays.items()
    }
    return Decoder(config, arrays)


def is_recurrent(model: Any) -> bool:
    """Tell whether a model has layers that keep a recurrent state."""
    return _is_decoder(model) and bool(model.config.recurrent)


def in_compute_dtype(model: Any) -> Any:
    """Return the model that a sampler should run.

    Args:
      model: any :class:`~topd_jax.models.protocol.LanguageModel`.

    Returns:
      A decoder with its parameters in its compute dtype; another model as it
      is.
    """
    if not isinstance(model, Decoder):
        return model
    return cast(model, model.config.dtype)


def drop_layers(model: Decoder, keep: Sequence[int]) -> Decoder:
    """Keep only some layers of a network.

    A student may so start from its teacher. Every array is a copy: the student
    may be donated while the teacher lives on.

    Args:
      model: the network to cut.
      keep: indices of the layers to keep, ascending.

    Returns:
      A decoder of ``len(keep)`` layers, spread over devices as ``model`` is.

    Raises:
      ValueError: where ``keep`` is empty, unsorted or out of range.
    """
    keep = [int(i) for i in keep]
    config = model.config.keep_layers(keep)
    held, arrays = model.arrays, {}
    # Of recurrent layers there may be none left.
    for name, row in parameter_table(config).items():
        array = held[name]
        if row.axes[0] == "layers":
            own = layers_of(model.config, name)
            kept = np.asarray([own.index(i) for i in keep if i in own], int)
            arrays[name] = _each(lambda x, kept=kept: x[kept], array)
        else:
            arrays[name] = _each(jnp.copy, array)
    return Decoder(config, arrays)


def _each(cut: Callable[[jax.Array], jax.Array], array: Any) -> Any:
    """Cut an array, or both arrays of a quantized matrix, where they are."""
    return jax.tree.map(lambda x: jax.device_put(cut(x), x.sharding), array)


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


def _rematerialized(body: Callable, config: DecoderConfig) -> Callable:
    if config.remat == "none":
        return body
    policy = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[config.remat]
    return jax.checkpoint(body, policy=policy)
