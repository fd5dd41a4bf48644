"""Compiles attention of 32 heads for a TPU topology: by the kernels.

    python tpu_flash.py v5e:2x4

A row's heads are spread over the tensor axis, and no scores exist outside of
the kernels: what is set aside is less than those of two heads.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from topd_jax import sharding
from topd_jax.models import DecoderConfig
from topd_jax.models.attention import Sight, attend
from topd_jax.spans import Spans

# Of Qwen3-8B, with 24 branches of 49 columns behind 8192 of a rollout.
HEADS, GROUPS, SIZE, COLUMNS = 32, 8, 128, 8192 + 24 * 49


def compiled(topology: str, dtype: str, attention: str) -> jax.stages.Compiled:
    """One row's attention and its gradients, on two chips."""
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    config = DecoderConfig(
        vocab_size=1, layers=1, width=1, mlp_width=1, heads=HEADS,
        kv_heads=GROUPS, head_dim=SIZE, dtype=dtype, attention=attention,
    )  # fmt: skip
    mesh = sharding.make_mesh(tensor=2, devices=devices[:2])

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


def main(topology: str) -> None:
    for dtype in ("bfloat16", "float32"):
        program = compiled(topology, dtype, "flash")
        aside = program.memory_analysis().temp_size_in_bytes
        text = program.as_text()
        kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
        assert kernels == 3, kernels
        scores = COLUMNS**2 * jnp.dtype(dtype).itemsize
        assert f"{COLUMNS},{COLUMNS}" not in text
        assert aside < 2 * scores, aside  # two heads of the sixteen of a chip
        print(f"{topology} {dtype}: {kernels} kernels, {aside / 2**20:.0f} MiB")
    blocks = compiled(topology, "bfloat16", "blocks")
    assert "tpu_custom_call" not in blocks.as_text()


if __name__ == "__main__":
    main(sys.argv[1])
