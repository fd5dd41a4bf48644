"""Text on eight simulated devices against one; run by test_sharded.

    python sharded_rollout.py rollouts|slots|decode

rollouts: and the branches of them. slots: no device receives the cache of all.
decode: by the decoding kernel, interpreted; each device reads the rows and
heads that it has.
"""

import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from interpreted import interpreted_kernels
from sharded_step import place, spread

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import init_decoder
from topd_jax.models.passes import trajectory_cache
from topd_jax.parallel.rules import DECODING
from topd_jax.parallel.sharding import make_mesh
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.types import Candidates, Prompts

CONFIG = DecoderConfig(
    vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8,
    mlp_width=48,
)  # fmt: skip
IDS = dict(eos_ids=(3, 5), pad_id=0)
MIXED = dict(data=2, fsdp=2, tensor=2)


def prompts() -> Prompts:
    rng = np.random.default_rng(0)
    mask = np.arange(8) >= 8 - rng.integers(1, 9, (16, 1))
    tokens = np.where(mask, rng.integers(6, 64, (16, 8)), 0)
    return Prompts(tokens.astype(np.int32), mask)


def decoder(**fields):
    return init_decoder(CONFIG.replace(**fields), jax.random.key(0))


@contextlib.contextmanager
def on_mesh(model, shape):
    """The model and the prompts, spread over a mesh of this shape."""
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        yield place(model, mesh), spread(prompts(), mesh)


def write(model, batch, sharding="train", new=9, slots=0, temperature=1.0):
    return rollout(
        model, batch, jax.random.key(1), max_new_tokens=new, samples=2,
        temperature=temperature, slots=slots, sharding=sharding, **IDS,
    )  # fmt: skip


def assert_same_text(one, out, atol=1e-5):
    for name in ("prompt", "tokens", "mask", "truncated"):
        np.testing.assert_array_equal(
            getattr(one, name), getattr(out, name), err_msg=name
        )
    np.testing.assert_allclose(one.logp, out.logp, atol=atol)


def look_ahead(model, out, positions, sharding, temperature):
    extra = branch_columns(positions.shape[1], 5)
    columns = out.sequence.shape[1] + extra
    hidden, cache = trajectory_cache(model, out, columns)
    candidates = Candidates(positions, positions < out.mask.sum(1)[:, None])
    return branch(
        model, cache, hidden, out, candidates, length=5, sharding=sharding,
        temperature=temperature, key=jax.random.key(2), return_hidden=True,
        vocab_size=CONFIG.vocab_size, **IDS,
    )  # fmt: skip


def everything(model, batch, sharding="train"):
    outputs = []
    for temperature in (0.0, 1.0):
        out = write(model, batch, sharding, temperature=temperature)
        positions = np.tile([[0, 2, 4]], (out.tokens.shape[0], 1))
        read = jax.jit(look_ahead, static_argnums=(3, 4))
        ahead = "train" if sharding == "tensor" else sharding
        found = read(model, out, positions, ahead, temperature)
        outputs.append((out, *found))
    return outputs


def rollouts():
    shapes = [(MIXED, name) for name in DECODING]
    # Two kv heads, and more devices than they divide among.
    shapes.append((dict(data=1, fsdp=4, tensor=2), "rows"))

    def found(case):
        shape, sharding = case
        with on_mesh(decoder(), shape) as placed:
            return everything(*placed, sharding)

    one = everything(decoder(), prompts())
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(found, shapes))
    for (shape, sharding), many in zip(shapes, results, strict=True):
        ways = 8 // shape.get("tensor", 1)
        for (a, wa, ha), (b, wb, hb) in zip(one, many, strict=True):
            rows = b.tokens.shape[0]
            parted = [b.tokens, b.mask, b.logp]
            if sharding in ("gathered", "rows"):  # of branches too
                parted += [wb.tokens, wb.mask, hb]
            for x in parted:
                assert x.sharding.shard_shape(x.shape)[0] == rows // ways
            assert_same_text(a, b)
            np.testing.assert_array_equal(wa.tokens, wb.tokens)
            np.testing.assert_array_equal(wa.mask, wb.mask)
            np.testing.assert_allclose(ha, hb, atol=1e-5)
            assert wa.mask.any()
        print(f"same on {shape} {sharding}", flush=True)


def largest_moved(program: str) -> int:
    """Return the most numbers that a device receives at once."""
    shapes = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(",
        program,
    )
    return max(int(np.prod([int(n) for n in s.split(",") if n] or [1]))
               for s in shapes)  # fmt: skip


def slots(new=24, count=8):
    one = write(decoder(), prompts(), new=new)
    for shape, sharding in (
        (dict(data=8), "train"),
        (MIXED, "rows"),
        (MIXED, "tensor"),
        (dict(data=2, fsdp=1, tensor=2, sequence=2), "gathered"),
    ):
        with on_mesh(decoder(), shape) as placed:
            program = jax.jit(write, static_argnums=(2, 3, 4))
            program = program.lower(*placed, sharding, new, count).compile()
            assert_same_text(one, program(*placed))
        # A device's slots have so many numbers of keys in a layer's cache.
        parts = 8 // shape.get("tensor", 1)
        cache = count // parts * CONFIG.kv_heads * CONFIG.head_dim * (8 + new)
        assert largest_moved(program.as_text()) < cache
        print(f"same on {shape} {sharding}", flush=True)


def decode():
    one = write(decoder(), prompts())
    # (Rows, kv heads) of a device: None where the heads and their keys would
    # part, and the kernel is left aside.
    for shape, sharding, part in (
        (MIXED, "train", (8, 1)),
        (dict(data=4, fsdp=1, tensor=2), "tensor", (8, 1)),
        (MIXED, "rows", (8, 1)),
        (MIXED, "tensor", None),
    ):
        with (
            on_mesh(decoder(attention="flash"), shape) as placed,
            interpreted_kernels() as calls,
        ):
            assert_same_text(one, write(*placed, sharding), atol=2e-4)
        held = {(s[1][1], s[1][2]) for name, s, _ in calls if name == "read"}
        assert held == ({part} if part else set()), held
        print(f"same on {shape} {sharding}: {sorted(held)}", flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8
    parts = (rollouts, slots, decode)
    {part.__name__: part for part in parts}[sys.argv[1]]()
