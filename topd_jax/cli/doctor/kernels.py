"""Whether the attention kernels of this machine's TPU do what blocks do (ours).

They are interpreted in the tests and compiled for chips that are not there; a
run that takes them compares them with plain attention on its own chip first.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.cli.doctor.findings import Finding, error, ok
from topd_jax.models import DecoderConfig
from topd_jax.models.attention.core import Sight, attend, flash, flash_decode
from topd_jax.models.attention.masks import Spans, branch_spans

# Columns of a rollout, of which some are padding; tokens of a branch; how far
# back a layer sees that slides.
_COLUMNS, _PADDING, _WINDOW, _REACH = 300, 5, 8, 60
# Rows of a cache, its columns, and how many of them are written.
_ROWS, _CACHED, _WRITTEN = 4, 3000, 2222
# Of the largest element: of results that are rounded to 8 bits, and to 24.
_MOST = {"bfloat16": 0.03, "float32": 0.003}


def kernels(
    models: Mapping[str, Any], *, interpret: bool = False
) -> list[Finding]:
    """Compares the kernels with plain attention on a small random problem.

    Args:
      models: name -> model of the run.
      interpret: run the kernels without a TPU, slowly.

    Returns:
      One finding for each shape of heads that ``attention=flash`` asks for;
      none where the platform is no TPU, which takes blocks.
    """
    if jax.default_backend() != "tpu" and not interpret:
        return []
    shapes: dict[DecoderConfig, str] = {}
    for name, model in models.items():
        config = getattr(model, "config", None)
        if getattr(config, "attention", "blocks") == "flash":
            shapes.setdefault(_alike(config), name)
    return [
        _judge(
            name,
            config,
            max(_farthest(config, interpret), _decoding(config, interpret)),
        )
        for config, name in shapes.items()
    ]


def _alike(config: DecoderConfig) -> DecoderConfig:
    """What of a decoder its attention depends on, with two heads of keys."""
    groups = min(config.kv_heads, 2)
    slides = any(config.sliding)
    return DecoderConfig(
        vocab_size=1,
        layers=1,
        width=1,
        mlp_width=1,
        heads=config.heads // config.kv_heads * groups,
        kv_heads=groups,
        head_dim=config.head_dim,
        query_scalar=config.query_scalar,
        attention_softcap=config.attention_softcap,
        window=_REACH if slides else None,
        sliding=(True,) if slides else (),
        dtype=config.dtype,
    )


def _farthest(config: DecoderConfig, interpret: bool) -> float:
    """How far output or gradients are off, of the largest element of each."""
    exists = jnp.arange(_COLUMNS)[None] >= _PADDING
    start = jnp.array([[9, 100, 257, 299]])
    spans = branch_spans(exists, start, jnp.ones((1, 4, _WINDOW), bool))
    columns = spans.exists.shape[1]
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (config.heads, config.kv_heads, config.kv_heads, config.heads)
    *given, slope = (
        jax.random.normal(k, (1, columns, n, config.head_dim), config.dtype)
        for k, n in zip(keys, heads, strict=True)
    )
    # Padding sees nothing: there the two need not agree.
    slope = slope.at[:, :_PADDING].set(0)
    found = jax.jit(_by_kernels, static_argnums=(3, 4))(
        given, slope, spans, config, interpret
    )
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(_plainly, static_argnums=3)(
            given, slope, spans, config
        )
    off = []
    for x, y in zip(found, wanted, strict=True):
        x, y = (a.astype(jnp.float32)[:, _PADDING:] for a in (x, y))
        off.append(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
    return float(jnp.max(jnp.stack(off)))


def _decoding(config: DecoderConfig, interpret: bool) -> float:
    """The same of what one token a row reads in the second of two layers."""
    column = jnp.arange(_CACHED)
    mask = column >= _PADDING * jnp.arange(_ROWS)[:, None]
    mask &= column < _WRITTEN
    first = jnp.zeros(_ROWS, jnp.int32)
    if config.sliding:
        mask &= column >= _WRITTEN - _REACH
        first = jnp.argmax(mask, axis=1)
    size = config.head_dim
    cache = (2, _ROWS, _CACHED, config.kv_heads, size)
    given = [
        jax.random.normal(key, shape, config.dtype)
        for key, shape in zip(
            jax.random.split(jax.random.key(1), 3),
            ((_ROWS, 1, config.heads, size), cache, cache),
            strict=True,
        )
    ]
    read = functools.partial(
        flash_decode.read, options=_options(config, interpret), usual=_CACHED
    )
    numbers = flash_decode.as_numbers(mask)
    found = jax.jit(read)(
        *given, jnp.int32(1), numbers, first, jnp.int32(_WRITTEN - 1)
    )
    sight = Sight(mask[:, None, None], jnp.zeros((_ROWS, 1)), None)
    with jax.default_matmul_precision("highest"):
        query, key, value = (x.astype(jnp.float32) for x in given)
        wanted = attend(
            query, key[1], value[1], sight, jnp.int32(_REACH), config
        )
    off = jnp.max(jnp.abs(found.astype(jnp.float32) - wanted))
    return float(off / jnp.max(jnp.abs(wanted)))


def _options(config: DecoderConfig, interpret: bool) -> flash.Options:
    scale = (config.query_scalar or config.head_dim) ** -0.5
    return flash.Options(scale, config.attention_softcap, interpret)


def _by_kernels(
    given: list[jax.Array],
    slope: jax.Array,
    spans: Spans,
    config: DecoderConfig,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    places = spans.last if config.sliding else None
    seen = flash.Seen(
        spans.exists, spans.prefix, spans.first, spans.last, places, places,
        jnp.int32(_REACH),
    )  # fmt: skip
    options = _options(config, interpret)
    out, normaliser = flash.forward(*given, seen, options)
    slopes = flash.backward(*given, seen, out, normaliser, slope, options)
    return out, *slopes


def _plainly(
    given: list[jax.Array],
    slope: jax.Array,
    spans: Spans,
    config: DecoderConfig,
) -> tuple[jax.Array, ...]:
    places = spans.last if config.sliding else None
    sight = Sight(spans.dense()[:, None], spans.last, places)

    def read(*x: jax.Array) -> jax.Array:
        return attend(*x, sight, jnp.int32(_REACH), config)

    out, back = jax.vjp(read, *(x.astype(jnp.float32) for x in given))
    return out, *back(slope.astype(jnp.float32))


def _judge(name: str, config: DecoderConfig, off: float) -> Finding:
    most = _MOST[config.dtype]
    text = (
        f"{name}: kernels of {config.heads // config.kv_heads} heads of "
        f"{config.head_dim} a key, {config.dtype}, are {off:.2g} of the "
        f"largest element off plain attention; the limit is {most}"
    )
    if off <= most:
        return ok("attention", text)
    section = name.replace("teacher ", "teachers.")
    return error("attention", text, f"set config.{section}.attention=blocks")
