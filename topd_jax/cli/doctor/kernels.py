"""Compare the attention kernels with plain attention, on the run's chip.

The tests interpret the kernels of TPUs, compile them for chips that are not
there, and lower cuDNN's for GPUs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.cli.doctor.findings import Finding, judge
from topd_jax.models import Cache, DecoderConfig
from topd_jax.models.attention import core, cudnn
from topd_jax.models.attention.masks import CachedMask, branch_intervals

# Columns of a rollout, of which some are padding; tokens of a branch; window
# of a layer that slides.
_COLUMNS, _PADDING, _STEPS, _WINDOW = 300, 5, 8, 60
# Rows of a cache, its columns, and how many of them are written.
_ROWS, _CACHED, _WRITTEN = 4, 3000, 2222
# Of the largest element: of results that are rounded to 8 bits, and to 24.
_MOST = {"bfloat16": 0.03, "float32": 0.003}


def kernels(models: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the kernels with plain attention on a small random problem.

    Args:
      models: name -> model of the run.

    Yields:
      A finding for each shape of heads that ``attention=flash`` asks for; none
      where the platform is no TPU and no GPU, which takes blocks.
    """
    platform = jax.default_backend()
    if platform not in ("tpu", "gpu"):
        return
    shapes: dict[DecoderConfig, str] = {}
    for name, model in models.items():
        config = getattr(model, "config", None)
        if getattr(config, "attention", "blocks") == "flash":
            shapes.setdefault(_shape(config), name)
    for config, name in shapes.items():
        heads = jax.ShapeDtypeStruct((1, 2, 1, config.head_dim), config.dtype)
        if platform == "gpu" and not cudnn.takes(
            heads, config.attention_softcap
        ):
            text = f"{name}: in blocks of queries; cuDNN takes bfloat16 heads "
            text += "of at most 128, no soft cap, NVIDIA Ampere or later"
            yield Finding("ok", "attention", text)
            continue
        off, most = max(_read(config), _decode(config)), _MOST[config.dtype]
        yield judge(
            "attention",
            off <= most,
            f"{name}: kernels of {config.heads // config.kv_heads} heads of "
            f"{config.head_dim} a key, {config.dtype}, are {off:.2g} of the "
            f"largest element off plain attention; the limit is {most}",
            f"--config.{name.replace(' ', 's.')}.attention=blocks",
            "error",
        )


def _shape(config: DecoderConfig) -> DecoderConfig:
    """Return what of a decoder its attention depends on, two heads of keys."""
    groups, slides = min(config.kv_heads, 2), any(config.sliding)
    return DecoderConfig(
        vocab_size=1, layers=1, width=1, mlp_width=1,
        heads=config.heads // config.kv_heads * groups, kv_heads=groups,
        head_dim=config.head_dim, attention_multiplier=config.attention_scale,
        attention_softcap=config.attention_softcap,
        window=_WINDOW if slides else None, sliding=(True,) * slides,
        dtype=config.dtype, attention="flash",
    )  # fmt: skip


def _normal(seed: int, dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    draws = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape, dtype) for key, shape in draws]


def _off(result: Any, expected: Any) -> float:
    """Return how far arrays are off, of the largest element of each."""
    pairs = zip(*map(jax.tree.leaves, (result, expected)), strict=True)
    return max(
        float(jnp.max(jnp.abs(x.astype(y.dtype) - y)) / jnp.max(jnp.abs(y)))
        for x, y in pairs
    )


def _read(config: DecoderConfig) -> float:
    """Compare reading a rollout with branches, and its gradient."""
    exists = jnp.arange(_COLUMNS)[None] >= _PADDING
    start = jnp.array([[9, 100, 257, 299]])
    mask = branch_intervals(exists, start, jnp.ones((1, 4, _STEPS), bool))
    if config.sliding:
        mask = mask.within(_WINDOW)
    (rows, length), size = mask.last.shape, config.head_dim
    tokens = rows, length, config.heads, size
    keys = rows, config.kv_heads, length, size
    *given, cotangent = _normal(0, config.dtype, tokens, keys, keys, tokens)
    # Padding attends to nothing: there the two need not agree.
    cotangent = cotangent.at[:, :_PADDING].set(0)

    @jax.jit
    def read(mask: Any, *given: jax.Array) -> list[jax.Array]:
        spec = core.MaskSpec(mask, None, None)
        out, pull = jax.vjp(
            lambda *x: core.attend(*x, spec, jnp.int32(_COLUMNS * 2), config),
            *given,
        )
        query, *of_keys = pull(cotangent.astype(out.dtype))
        of_keys = [jnp.swapaxes(x, 1, 2) for x in of_keys]
        return [x[:, _PADDING:] for x in (out, query, *of_keys)]

    result = read(mask, *given)
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in given)
        expected = read(mask.dense()[:, None], *wide)
    return _off(result, expected)


def _decode(config: DecoderConfig) -> float:
    """Compare what one token a row reads in the second of two layers."""
    column = jnp.arange(_CACHED)
    exists = column >= _PADDING * jnp.arange(_ROWS)[:, None]
    mask = CachedMask(exists, jnp.int32(_WRITTEN), _CACHED)
    cached = (2, _ROWS, config.kv_heads, _CACHED, config.head_dim)
    token = (_ROWS, 1, config.heads, config.head_dim)
    given = _normal(1, config.dtype, token, cached, cached)
    keys_at = jnp.broadcast_to(column, exists.shape) if config.sliding else None
    at, window = jnp.full((_ROWS, 1), _WRITTEN - 1), jnp.int32(_WINDOW)

    @jax.jit
    def by_kernel(query: jax.Array, *cached: jax.Array) -> Any:
        spec = core.MaskSpec(mask, at, keys_at)
        cache = Cache(*cached, jnp.int32(_WRITTEN))
        return core.attend_cached(
            query, cache, jnp.int32(1), spec, window, config
        )

    spec = core.MaskSpec(mask.dense()[:, None], at, keys_at)
    with jax.default_matmul_precision("highest"):
        query, key, value = (x.astype(jnp.float32) for x in given)
        expected = core.attend(query, key[1], value[1], spec, window, config)
    return _off(by_kernel(*given), expected)
