"""Compiles a loop over tokens for a TPU topology: attention by the kernel.

    python tpu_decode.py v5e:2x4

A row's heads are spread over the tensor axis. Each layer's columns are written
into the cache of all layers and read there: a quarter of a layer is more than
all that is set aside beside it, and no other operation reads a column.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from topd_jax.models import DecoderConfig
from topd_jax.models.attention.core import (
    Cache,
    attend,
    attend_cached,
    look,
    reach,
    write_columns,
)
from topd_jax.models.attention.masks import Written
from topd_jax.parallel import sharding
from topd_jax.planning import hlo, hlo_cost

# Four rows of 32k tokens on each of two chips, in three layers.
LAYERS, ROWS, COLUMNS, STEPS = 3, 4, 33792, 100
SHAPES = {
    "Qwen3-8B": dict(heads=32, kv_heads=8, head_dim=128),
    "Gemma 2": dict(
        heads=16, kv_heads=8, head_dim=256, attention_softcap=50.0,
        window=4096, sliding=(True, False, True),
    ),
}  # fmt: skip


def compiled(
    topology: str, attention: str, dtype: str, shape: dict
) -> jax.stages.Compiled:
    """The attention of some tokens, each of all layers, on two chips."""
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    config = DecoderConfig(
        vocab_size=1, layers=LAYERS, width=1, mlp_width=1, dtype=dtype,
        attention=attention, **shape,
    )  # fmt: skip
    mesh = sharding.make_mesh(tensor=2, devices=devices[:2])

    def like(axes, *sizes, dtype=dtype):
        place = NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    query = like(
        (None, None, "heads", None), ROWS, 1, config.heads, config.head_dim
    )
    exists = like((None, None), ROWS, COLUMNS, dtype=bool)

    def empty():
        wide = LAYERS, ROWS, COLUMNS, config.kv_heads, config.head_dim
        stacked = sharding.constrain(
            jnp.zeros(wide, dtype),
            None, "batch", None, "activation_kv_heads", None,
        )  # fmt: skip
        places = jnp.zeros((1, ROWS, COLUMNS), jnp.int32)
        return Cache(
            stacked, stacked, jnp.int32(0), places if config.sliding else None
        )

    def write(query, exists):
        def token(carry, _):
            query, cache = carry
            length = cache.length + 1
            at = jnp.broadcast_to(cache.length, (ROWS, 1))
            mask = Written(exists, length, COLUMNS // 2)
            sight, cache = look(config, at, mask, cache)

            def layer(carry, options):
                query, cache = carry
                index, far = options
                new = query[:, :, : config.kv_heads]
                cache, key, value = write_columns(cache, new, new, index)
                out = attend_cached(query, cache, index, sight, far, config)
                if out is None:
                    out = attend(query, key, value, sight, far, config)
                return (out, cache), None

            options = jnp.arange(LAYERS), jnp.asarray(reach(config))
            carry, _ = jax.lax.scan(layer, (query, cache), options)
            return (carry[0], carry[1].replace(length=length)), None

        start = query, empty()
        return jax.lax.scan(token, start, length=STEPS)[0][0]

    with jax.set_mesh(mesh):
        return jax.jit(write).lower(query, exists).compile()


def kernels(program: jax.stages.Compiled) -> int:
    """How many kernels a program has."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def moved(program: jax.stages.Compiled) -> float:
    """Bytes that a device reads and writes."""
    return hlo_cost.count(hlo.parse(program.as_text())).bytes


def layer_bytes(name: str, item: int) -> int:
    """Of keys and values of one layer, on one of two chips."""
    shape = SHAPES[name]
    heads = shape["kv_heads"] // 2 * shape["head_dim"]
    return 2 * ROWS * COLUMNS * heads * item


def main(topology: str) -> None:
    for name, shape in SHAPES.items():
        for dtype in ("bfloat16", "float32"):
            program = compiled(topology, "flash", dtype, shape)
            assert kernels(program) == 1, kernels(program)
            aside = program.memory_analysis().temp_size_in_bytes
            one = layer_bytes(name, jnp.dtype(dtype).itemsize)
            assert aside < (LAYERS + 0.25) * one, (name, dtype, aside / one)
            # Half of the columns, as usual, or a window of them in two of three
            # layers; half a block more, and what empties the cache.
            read = moved(program) / (STEPS * LAYERS * one)
            window = shape.get("window", COLUMNS / 2)
            usual = (0.5 + 2 * window / COLUMNS) / 3
            assert usual < read < usual + 0.1, (name, dtype, read)
            print(f"{topology} {name} {dtype} reads the cache in place")
    plain = compiled(topology, "blocks", "bfloat16", SHAPES["Qwen3-8B"])
    assert kernels(plain) == 0
    # All columns, also those that are yet to be written.
    assert moved(plain) > STEPS * LAYERS * layer_bytes("Qwen3-8B", 2)


if __name__ == "__main__":
    main(sys.argv[1])
