"""Tunix's side: greedy decoding with its sampler."""

import time
import types

import jax
from flax import nnx
from serving import serve
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3


def tokenizer(vocab):
    """Make as little of a tokenizer as Tunix's adapter takes."""

    def encode(text, **_):
        return [
            3 + (ord(c) * 31 + i * 7) % (vocab - 3) for i, c in enumerate(text)
        ]

    return types.SimpleNamespace(
        encode=encode,
        decode=lambda ids, **_: " ".join(map(str, ids)),
        bos_id=lambda: 0,  # the sampler puts no such id first
        eos_id=lambda: 2,
        pad_id=lambda: 1,
    )


def decode(student, rows, prompt, new):
    """Decode with random weights."""
    s = student
    config = qwen3.ModelConfig(
        num_layers=s["layers"], vocab_size=s["vocab_size"],
        embed_dim=s["width"], hidden_dim=s["mlp_width"],
        num_heads=s["heads"], head_dim=s["head_dim"],
        num_kv_heads=s["kv_heads"], rope_theta=1_000_000, norm_eps=1e-6,
        use_tied_embedding=True, dtype=jax.numpy.float32,
        param_dtype=jax.numpy.float32,
    )  # fmt: skip
    cache = sampler.CacheConfig(
        cache_size=prompt + new, num_layers=s["layers"],
        num_kv_heads=s["kv_heads"], head_dim=s["head_dim"],
    )  # fmt: skip
    write = sampler.Sampler(
        qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        tokenizer(s["vocab_size"]),
        cache,
    )
    texts = [f"{i:0{prompt}d}" for i in range(rows)]

    def run():
        start = time.perf_counter()
        out = write(
            input_strings=texts, max_generation_steps=new,
            max_prompt_length=prompt, temperature=0.0,
            eos_tokens=[s["vocab_size"] + 10],
        )  # fmt: skip
        seconds = time.perf_counter() - start
        assert sum(map(len, out.tokens)) == rows * new
        return {"seconds": seconds}

    return run


if __name__ == "__main__":
    serve({"decode": decode})
