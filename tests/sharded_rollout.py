"""Child of test_rollout: rollouts and branches on 8 devices equal 1."""

import threading

import jax
import numpy as np

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import init_decoder
from topd_jax.models.passes import trajectory_cache
from topd_jax.parallel.rules import DECODING
from topd_jax.parallel.sharding import (
    batch_shardings,
    make_mesh,
    tree_shardings,
)
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.types import Candidates, Prompts

CONFIG = DecoderConfig(
    vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8,
    mlp_width=48,
)  # fmt: skip
IDS = dict(eos_ids=(3, 5), pad_id=0)


def prompts() -> Prompts:
    rng = np.random.default_rng(0)
    mask = np.arange(8) >= 8 - rng.integers(1, 9, (16, 1))
    tokens = np.where(mask, rng.integers(6, 64, (16, 8)), 0)
    return Prompts(tokens.astype(np.int32), mask)


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
        out = rollout(
            model, batch, jax.random.key(1), max_new_tokens=9,
            temperature=temperature, samples=2, sharding=sharding, **IDS,
        )  # fmt: skip
        positions = np.tile([[0, 2, 4]], (out.tokens.shape[0], 1))
        read = jax.jit(look_ahead, static_argnums=(3, 4))
        ahead = "train" if sharding == "tensor" else sharding
        found = read(model, out, positions, ahead, temperature)
        outputs.append((out, *found))
    return outputs


def on_mesh(model, shape, sharding, results):
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        batch = jax.device_put(prompts(), batch_shardings(prompts(), mesh))
        spread = tree_shardings(model, mesh, model.logical_axes)
        model = jax.device_put(model, spread)
        results[str(shape), sharding] = everything(model, batch, sharding)


def main() -> None:
    model = init_decoder(CONFIG, jax.random.key(0))
    one = everything(model, prompts())
    mixed = dict(data=2, fsdp=2, tensor=2)
    shapes = [(dict(data=8), "train"), *((mixed, name) for name in DECODING)]
    # Two kv heads, and more devices than they divide among.
    shapes.append((dict(data=1, fsdp=4, tensor=2), "rows"))
    results = {}
    threads = [
        threading.Thread(target=on_mesh, args=(model, *shape, results))
        for shape in shapes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shape, sharding in shapes:
        ways = 8 // shape.get("tensor", 1)
        for (a, wa, ha), (b, wb, hb) in zip(
            one, results[str(shape), sharding], strict=True
        ):
            rows = b.tokens.shape[0]
            spread = [b.tokens, b.mask, b.logp]
            if sharding in ("gathered", "rows"):  # of branches too
                spread += [wb.tokens, wb.mask, hb]
            for x in spread:
                assert x.sharding.shard_shape(x.shape)[0] == rows // ways
            for name in ("prompt", "tokens", "mask", "truncated"):
                np.testing.assert_array_equal(getattr(a, name),
                                              getattr(b, name))  # fmt: skip
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
            np.testing.assert_array_equal(wa.tokens, wb.tokens)
            np.testing.assert_array_equal(wa.mask, wb.mask)
            np.testing.assert_allclose(ha, hb, atol=1e-5)
            assert wa.mask.any()
    print("equal")


if __name__ == "__main__":
    main()
