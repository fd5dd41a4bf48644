"""Decoding speed, as JSON lines; nothing here fails for being slow.

``pytest -m benchmark -s tests/benchmarks/test_decode_benchmark.py``. The model
is the one that the peers were measured with: 4 layers, width 256, 4 heads of
64, vocabulary 4096. Tunix' sampler on 2 cores: 3,373 tokens/s for 8 x 64,
1,399 for one row, 7,176 for 64; transformers: 3,597 for 16 x 256.
"""

import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import causal_mask, init_decoder
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.types import Candidates, Prompts, completion_states

pytestmark = pytest.mark.benchmark

PEER = dict(
    vocab_size=4096, layers=4, width=256, heads=4, kv_heads=2, head_dim=64,
    mlp_width=1024,
)  # fmt: skip
TINY_TEACHER = dict(
    vocab_size=80, layers=3, width=128, heads=4, kv_heads=4, head_dim=32,
    mlp_width=512, unroll=3,
)  # fmt: skip
PROMPT = 16


def seconds(run: Callable[[], jax.Array], repeats: int = 5) -> dict[str, float]:
    """Wall and processor time of the fastest warm run, and of the first."""
    start = time.perf_counter()
    run().block_until_ready()
    first = time.perf_counter() - start
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        run().block_until_ready()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"first": first, "wall": min(wall), "cpu": min(cpu)}


def prompts(rows: int) -> Prompts:
    tokens = jax.random.randint(jax.random.key(1), (rows, PROMPT), 0, 80)
    return Prompts(tokens, jnp.ones(tokens.shape, bool))


def say(**row: object) -> None:
    numbers = {
        k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()
    }
    print(json.dumps(numbers), flush=True)


@pytest.mark.parametrize("unroll", [4, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("rows", "new"), [(8, 64), (16, 256), (1, 64), (64, 64)]
)
def test_decode(rows: int, new: int, temperature: float, unroll: int) -> None:
    model = init_decoder(
        DecoderConfig(**PEER, unroll=unroll), jax.random.key(0)
    )
    took = seconds(
        lambda: rollout(
            model, prompts(rows), jax.random.key(0), max_new_tokens=new,
            eos_ids=(), pad_id=0, temperature=temperature,
        ).tokens
    )  # fmt: skip
    say(
        work="decode", rows=rows, new=new, temperature=temperature,
        unroll=unroll, tokens_per_second=rows * new / took["wall"], **took,
    )  # fmt: skip


@pytest.mark.parametrize("unused", [0, 1024])
def test_cost_of_columns_that_are_not_reached(unused: int) -> None:
    """What a longer limit costs rows that do not reach it."""
    model = init_decoder(DecoderConfig(**PEER), jax.random.key(0))
    took = seconds(
        lambda: rollout(
            model, prompts(8), jax.random.key(0),
            max_new_tokens=64 + unused, eos_ids=tuple(range(4096)), pad_id=0,
        ).tokens
    )  # fmt: skip
    say(work="first token", unused=unused, **took)


@pytest.mark.parametrize(("count", "length"), [(3, 10), (3, 1)])
def test_branch(count: int, length: int) -> None:
    model = init_decoder(DecoderConfig(**TINY_TEACHER), jax.random.key(0))
    ids = dict(eos_ids=(), pad_id=0)
    written = rollout(
        model, prompts(32), jax.random.key(0), max_new_tokens=48, **ids
    )
    positions = jnp.tile(jnp.arange(count) * 10, (32, 1))
    candidates = Candidates(positions, jnp.ones_like(positions, bool))

    @jax.jit
    def look_ahead(model, written):
        extra = branch_columns(count, length)
        mask = causal_mask(written.sequence_mask)
        hidden, cache = model(
            written.sequence,
            written.positions,
            jnp.pad(mask, ((0, 0), (0, 0), (0, extra))),
            model.init_cache(32, written.sequence.shape[1] + extra),
        )
        return branch(
            model, cache, completion_states(hidden, PROMPT), written,
            candidates, length=length, vocab_size=model.head.shape[0], **ids,
        )[0].tokens  # fmt: skip

    took = seconds(lambda: look_ahead(model, written))
    say(work="branch", rows=32, count=count, length=length, **took)
