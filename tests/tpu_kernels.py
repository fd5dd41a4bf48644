"""Compiles the kernels for a TPU topology, without the TPU.

    python tpu_kernels.py flash|decode|experts|families v5e:2x4

flash: a row's heads are spread over the tensor axis, and no scores exist
outside of the kernels: temporaries are smaller than those of two heads. Nor do
those of branches that are being written.

decode: each layer's keys are written into the cache of all layers and read
there: temporaries are smaller than a quarter of a layer, and no other
operation reads a key.

experts: the products of a mixture's layer are megablox.

families: a layer of gpt-oss-20b and one of GLM-4-9B, and their gradients.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from topd_jax.models import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    parameter_table,
)
from topd_jax.models.attention.cache import Cache, write_cache
from topd_jax.models.attention.core import (
    MaskSpec,
    attend,
    attend_cached,
    layer_windows,
    prepare_mask,
)
from topd_jax.models.attention.masks import (
    BranchMask,
    CachedMask,
    IntervalMask,
    causal_intervals,
)
from topd_jax.models.experts import mix
from topd_jax.parallel import sharding
from topd_jax.planning import hlo, hlo_cost
from topd_jax.types import positions_of

EVERYWHERE = jnp.int32(np.iinfo(np.int32).max)
QWEN3_8B = dict(heads=32, kv_heads=8, head_dim=128)
GEMMA_2 = dict(
    heads=16, kv_heads=8, head_dim=256, attention_softcap=50.0, window=4096,
    sliding=(True, False, True),
)  # fmt: skip


def devices(topology):
    return topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices


def compile_on(mesh, function, *arrays):
    """A program of (shape, dtype, axes) placeholders."""

    def placeholder(shape, dtype, axes):
        place = NamedSharding(mesh, sharding.spec_on(mesh, axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def is_array(x):
        return isinstance(x, tuple) and not isinstance(x[1], tuple | dict)

    given = jax.tree.map(lambda x: placeholder(*x), arrays, is_leaf=is_array)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*given).compile()


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


# Of Qwen3-8B, with 24 branches of 49 keys behind 8192 of a rollout.
READ = 8192
KEYS = READ + 24 * 49


def heads_of(length, kind, dtype):
    count, size = QWEN3_8B[kind], QWEN3_8B["head_dim"]
    if kind == "heads":
        return (1, length, count, size), dtype, (None, None, kind, None)
    return (1, count, length, size), dtype, (None, kind, None, None)


def row(length, dtype):
    return (1, length), dtype, (None, None)


def flash(topology):
    mesh = sharding.make_mesh(tensor=2, devices=devices(topology)[:2])
    config = DecoderConfig(
        vocab_size=1, layers=1, width=1, mlp_width=1, attention="flash",
        **QWEN3_8B,
    )  # fmt: skip

    def read(mask, *arrays):
        spec = MaskSpec(mask, mask.prefix, None)
        return attend(*arrays, spec, EVERYWHERE, config)

    def learn(exists, numbers, cotangent, *arrays):
        mask = IntervalMask(exists, *[numbers] * 4)
        out, back = jax.vjp(functools.partial(read, mask), *arrays)
        return out, back(cotangent)

    for dtype in ("bfloat16", "float32"):
        query, key = (heads_of(KEYS, k, dtype) for k in ("heads", "kv_heads"))
        given = row(KEYS, bool), row(KEYS, jnp.int32), query, query, key, key
        program = compile_on(mesh, learn, *given)
        assert kernels(program) == 3
        assert f"{KEYS},{KEYS}" not in program.as_text()
        scores = KEYS**2 * jnp.dtype(dtype).itemsize
        assert temporaries(program) < 2 * scores  # of the sixteen of a chip
        print(f"{topology} {dtype}: 3 kernels")
    count, steps = 218, 49
    length = READ + count * steps
    key = heads_of(length, "kv_heads", "bfloat16")
    program = compile_on(
        mesh, lambda *x: read(BranchMask(*x[:2], READ), *x[2:]),
        row(length, bool), row(count, jnp.int32),
        heads_of(count, "heads", "bfloat16"), key, key,
    )  # fmt: skip
    assert kernels(program) == 1
    scores = config.heads // 2 * count * READ * 4  # of a chip, prefix alone
    assert temporaries(program) < scores


# Four rows of 32k tokens on each of two chips, in three layers.
LAYERS, ROWS, LENGTH, STEPS = 3, 4, 33792, 100


def decoding(topology, dtype, shape):
    """The attention of some tokens, each of all layers, on two chips."""
    mesh = sharding.make_mesh(tensor=2, devices=devices(topology)[:2])
    config = DecoderConfig(
        vocab_size=1, layers=LAYERS, width=1, mlp_width=1, dtype=dtype,
        attention="flash", **shape,
    )  # fmt: skip

    def token(exists, carry, _):
        query, cache = carry
        length = cache.length + 1
        at = jnp.broadcast_to(cache.length, (ROWS, 1))
        mask = CachedMask(exists, length, LENGTH // 2)
        spec, cache = prepare_mask(config, at, mask, cache)

        def layer(carry, options):
            query, cache = carry
            index, window = options
            new = query[:, :, : config.kv_heads]
            cache, *_ = write_cache(cache, new, new, index)
            out = attend_cached(query, cache, index, spec, window, config)
            return (out, cache), None

        options = jnp.arange(LAYERS), jnp.asarray(layer_windows(config))
        (query, cache), _ = jax.lax.scan(layer, (query, cache), options)
        return (query, cache.replace(length=length)), None

    def write(query, exists):
        wide = LAYERS, ROWS, config.kv_heads, LENGTH, config.head_dim
        axes = (None, "batch", "activation_kv_heads", None, None)
        empty = sharding.constrain(jnp.zeros(wide, dtype), *axes)
        places = jnp.zeros((1, ROWS, LENGTH), jnp.int32)
        places = places if config.sliding else None
        start = query, Cache(empty, empty, jnp.int32(0), places)
        step = functools.partial(token, exists)
        return jax.lax.scan(step, start, length=STEPS)[0][0]

    query = (ROWS, 1, config.heads, config.head_dim)
    return compile_on(
        mesh, write, (query, dtype, (None, None, "heads", None)),
        ((ROWS, LENGTH), bool, (None, None)),
    )  # fmt: skip


def decode(topology):
    for shape in (QWEN3_8B, GEMMA_2):
        for dtype in ("bfloat16", "float32"):
            program = decoding(topology, dtype, shape)
            size = shape["kv_heads"] // 2 * shape["head_dim"]
            layer = 2 * ROWS * LENGTH * size * jnp.dtype(dtype).itemsize
            assert kernels(program) == 1
            assert temporaries(program) < (LAYERS + 0.25) * layer
            # Half of the keys, as usual, or a window of them in two of three
            # layers; half a block more, and what empties the cache.
            window = shape.get("window", LENGTH / 2)
            usual = (0.5 + 2 * window / LENGTH) / 3
            moved = hlo_cost.count(hlo.parse(program.as_text())).bytes
            read = moved / (STEPS * LAYERS * layer)
            assert usual < read < usual + 0.1, (shape, dtype, read)
            print(f"{topology} {dtype} reads the cache in place")


def experts(topology):
    """One layer of Qwen3-30B-A3B."""
    config = DecoderConfig(
        vocab_size=1, layers=1, width=2048, heads=32, kv_heads=4,
        head_dim=128, mlp_width=6144, experts=128, experts_per_token=8,
        expert_width=768, renormalize=True,
    )  # fmt: skip
    d, e, f = config.width, config.experts, config.expert_width
    weights = {
        "router": ((d, e), ("embed", None)),
        "expert_gate": ((e, d, f), ("expert", "embed", "mlp")),
        "expert_up": ((e, d, f), ("expert", "embed", "mlp")),
        "expert_down": ((e, f, d), ("expert", "mlp", "embed")),
    }
    mesh = sharding.make_mesh(fsdp=2, expert=4, devices=devices(topology))

    def learn(x, w):
        return jax.grad(lambda w: mix(x, w, config).astype("float32").sum())(w)

    for dtype in ("bfloat16", "float32"):
        w = {n: (shape, dtype, axes) for n, (shape, axes) in weights.items()}
        # Three products; their weights' gradients, and that of the inner one.
        for read, tokens, count in (
            (lambda x, w: mix(x, w, config), 1, 3), (learn, 256, 7)
        ):  # fmt: skip
            x = (8, tokens, d), dtype, ("batch", None, None)
            assert kernels(compile_on(mesh, read, x, w)) == count
            print(f"{dtype}: {count} kernels", flush=True)


GPT_OSS = DecoderConfig(
    vocab_size=1024, layers=1, width=2880, heads=64, kv_heads=8, head_dim=64,
    mlp_width=2880, window=128, sliding=(True,), experts=32, sinks=True,
    experts_per_token=4, expert_width=2880, expert_biases=True,
    swiglu_limit=7.0, renormalize=True, attention_bias=True, output_bias=True,
    rope_scaling=RopeScaling("yarn", 32.0, 4096.0, truncate=False),
)  # fmt: skip
GLM_4 = DecoderConfig(
    vocab_size=1024, layers=1, width=4096, heads=32, kv_heads=2, head_dim=128,
    mlp_width=13696, attention_bias=True, post_norms=True, rotary_dim=64,
    interleaved_rope=True,
)  # fmt: skip


def families(topology):
    mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=devices(topology))
    tokens = (8, 2048), jnp.int32, ("batch", None)
    for name, config in (("gpt-oss", GPT_OSS), ("glm-4", GLM_4)):
        config = config.replace(
            dtype="bfloat16", param_dtype="bfloat16", remat="full"
        )

        def learn(arrays, tokens, config=config):
            mask = jnp.ones(tokens.shape, bool)

            def loss(arrays):
                model = Decoder(config, arrays)
                hidden, _ = model(
                    tokens, positions_of(mask), causal_intervals(mask)
                )
                return hidden.astype("float32").sum()

            return jax.grad(loss)(arrays)

        arrays = {
            name: (row.shape, "bfloat16", row.axes)
            for name, row in parameter_table(config).items()
        }
        program = compile_on(mesh, learn, arrays, tokens)
        # The products of experts, and nothing else.
        assert bool(kernels(program)) == bool(config.experts)
        print(f"{name}: compiled, {temporaries(program)} bytes", flush=True)


if __name__ == "__main__":
    {
        function.__name__: function
        for function in (flash, decode, experts, families)
    }[sys.argv[1]](sys.argv[2])
