"""Compiles attention of 32 heads for a TPU topology: by the kernels.

    python tpu_flash.py v5e:2x4

A row's heads are spread over the tensor axis, and no scores exist outside of
the kernels: what is set aside is less than those of two heads. Nor do those of
branches that are being written.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from topd_jax.models import DecoderConfig
from topd_jax.models.attention.core import Sight, attend
from topd_jax.models.attention.masks import Branching, Spans
from topd_jax.parallel import sharding

# Of Qwen3-8B, with 24 branches of 49 columns behind 8192 of a rollout.
HEADS, GROUPS, SIZE, READ = 32, 8, 128, 8192
COLUMNS = READ + 24 * 49


def setting(
    topology: str, dtype: str, attention: str
) -> tuple[DecoderConfig, jax.sharding.Mesh]:
    """The heads of Qwen3-8B, on two chips."""
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    config = DecoderConfig(
        vocab_size=1, layers=1, width=1, mlp_width=1, heads=HEADS,
        kv_heads=GROUPS, head_dim=SIZE, dtype=dtype, attention=attention,
    )  # fmt: skip
    return config, sharding.make_mesh(tensor=2, devices=devices[:2])


def compiled(topology: str, dtype: str, attention: str) -> jax.stages.Compiled:
    """One row's attention and its gradients, on two chips."""
    config, mesh = setting(topology, dtype, attention)

    def shape(axes, *sizes, dtype=dtype):
        place = NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def heads(count):
        return shape((None, None, "heads", None), 1, COLUMNS, count, SIZE)

    numbers = shape((None, None), 1, COLUMNS, dtype=jnp.int32)
    exists = shape((None, None), 1, COLUMNS, dtype=bool)
    spans = Spans(exists, numbers, numbers, numbers)

    def learn(query, key, value, spans, slope):
        def read(*x):
            reach = jnp.int32(np.iinfo(np.int32).max)
            return attend(*x, Sight(spans, spans.last, None), reach, config)

        out, back = jax.vjp(read, query, key, value)
        return out, back(slope)

    with jax.set_mesh(mesh):
        query, key = heads(HEADS), heads(GROUPS)
        lowered = jax.jit(learn).lower(query, key, key, spans, query)
        return lowered.compile()


def of_branches(topology: str, count: int, steps: int) -> jax.stages.Compiled:
    """One step of a row's branches, on two chips."""
    config, mesh = setting(topology, "bfloat16", "flash")

    def shape(*sizes, dtype="bfloat16", heads=None):
        axes = (None, None, heads, None)[: len(sizes)]
        place = NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    columns = READ + count * steps
    sees = Branching(
        shape(1, columns, dtype=bool), shape(1, count, dtype=jnp.int32), READ
    )

    def read(query, key, value, sees):
        reach = jnp.int32(np.iinfo(np.int32).max)
        sight = Sight(sees, sees.prefix, None)
        return attend(query, key, value, sight, reach, config)

    with jax.set_mesh(mesh):
        query = shape(1, count, HEADS, SIZE, heads="heads")
        key = shape(1, columns, GROUPS, SIZE, heads="kv_heads")
        return jax.jit(read).lower(query, key, key, sees).compile()


def count_kernels(program: jax.stages.Compiled) -> int:
    """Calls of kernels in a program's text."""
    call = r'custom_call_target="tpu_custom_call"'
    return len(re.findall(call, program.as_text()))


def main(topology: str) -> None:
    for dtype in ("bfloat16", "float32"):
        program = compiled(topology, dtype, "flash")
        aside = program.memory_analysis().temp_size_in_bytes
        text = program.as_text()
        kernels = count_kernels(program)
        assert kernels == 3, kernels
        scores = COLUMNS**2 * jnp.dtype(dtype).itemsize
        assert f"{COLUMNS},{COLUMNS}" not in text
        assert aside < 2 * scores, aside  # two heads of the sixteen of a chip
        print(f"{topology} {dtype}: {kernels} kernels, {aside / 2**20:.0f} MiB")
    blocks = compiled(topology, "bfloat16", "blocks")
    assert count_kernels(blocks) == 0
    branches = of_branches(topology, 218, 49)
    aside = branches.memory_analysis().temp_size_in_bytes
    assert count_kernels(branches) == 1
    scores = HEADS // 2 * 218 * READ * 4  # of a chip, with the prefix alone
    assert aside < scores, aside
    print(f"{topology} branches: 1 kernel, {aside / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(sys.argv[1])
