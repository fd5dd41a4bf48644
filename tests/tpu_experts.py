"""Compiles a mixture's layer for a TPU topology: its products are megablox."""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from topd_jax.models import DecoderConfig
from topd_jax.models.experts import mix
from topd_jax.parallel import sharding

# One layer of Qwen3-30B-A3B.
CONFIG = DecoderConfig(
    vocab_size=151_936,
    layers=1,
    width=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    mlp_width=6144,
    experts=128,
    experts_per_token=8,
    expert_width=768,
    renormalise=True,
)
AXES = {
    "router": ("embed", None),
    "expert_gate": ("expert", "embed", "mlp"),
    "expert_up": ("expert", "embed", "mlp"),
    "expert_down": ("expert", "mlp", "embed"),
}


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(
        topology_name=topology, platform="tpu"
    ).devices
    d, e, f = CONFIG.width, CONFIG.experts, CONFIG.expert_width
    shapes = {
        "router": (d, e),
        "expert_gate": (e, d, f),
        "expert_up": (e, d, f),
        "expert_down": (e, f, d),
    }
    mesh = sharding.make_mesh(fsdp=2, expert=4, devices=devices)

    def on_mesh(shape, axes, dtype):
        shards = NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=shards)

    for dtype in ("bfloat16", "float32"):
        w = {n: on_mesh(s, AXES[n], dtype) for n, s in shapes.items()}

        def read(x, w):
            return mix(x, w, CONFIG)

        def learn(x, w):
            return jax.grad(lambda w: read(x, w).astype("float32").sum())(w)

        for name, fn, tokens in (("read", read, 1), ("learn", learn, 256)):
            x = on_mesh((8, tokens, d), ("batch", None, None), dtype)
            with jax.set_mesh(mesh):
                compiled = jax.jit(fn).lower(x, w).compile()
            text = compiled.as_text()
            count = text.count('custom_call_target="tpu_custom_call"')
            # Three products; their weights' gradients, and that of the inner.
            assert count == (3 if name == "read" else 3 + 3 + 1), count
            size = compiled.memory_analysis().temp_size_in_bytes
            flops = compiled.cost_analysis().get("flops", jnp.nan)
            print(
                f"{name} {dtype}: {count} kernels, {size / 2**20:.0f} MB "
                f"temporaries, {flops:.3g} flops",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
