"""GGUF files whose tensors llama.cpp changes, read by transformers and by us.

Needs torch (the ``parity`` extra). The files are written with the ``gguf``
package as llama.cpp's converter writes them; that transformers reads back the
model shows that they are.
"""

import dataclasses

import numpy as np
import pytest
from small_files import write_gguf
from tiny_configs import MODELS, SHAPE, VOCAB
from tiny_families import random, torch, transformers

from topd_jax.models import load
from topd_jax.models.io.gguf import gguf_config, open_gguf

pytestmark = pytest.mark.slow

BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = [
    "<eos>", "<pad>", "<bos>", "<unk>", *BYTES, "\n", "  ", "   ", "ab",
    "\u2581a", "\u2581ab", "abc", "bc", "cc", "\u2581", "a", "b", "c", ".",
    "<turn>",
]  # fmt: skip
PIECES += [f"[{i}]" for i in range(VOCAB - len(PIECES))]
KINDS = [3, 3, 3, 2, *[6] * 256, *[4] * 3, *[1] * 11, 3]
KINDS += [5] * (VOCAB - len(KINDS))
TEXTS = ("ab abc  bccc.", "   a\nb  ", "caf\u00e9 <turn>ab")

MERGES = ["a b", "ab c"]
IDS = {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.unknown_token_id": 3}
# Layers that predict further tokens, which are not read.
FURTHER = {f"blk.{i}.nextn.enorm.weight": np.ones(3, "f4") for i in (4, 5)}
DELTA = {
    "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2,
    "ssm.time_step_rank": 4, "ssm.inner_size": 40, "rope.dimension_count": 8,
    "full_attention_interval": 2, "rope.dimension_sections": [2, 1, 1, 0],
}  # fmt: skip
WINDOW = {
    "attention.sliding_window": 5, "attention.sliding_window_pattern": 3,
    "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    "rope.freq_base_swa": 300.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
# name -> (architecture, metadata, other fields of the model)
CASES = {
    "gemma3": (
        "gemma3", WINDOW,
        {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "qwen3.5": (
        "qwen35", DELTA | {"block_count": 6, "nextn_predict_layers": 2}, {},
    ),
    "qwen3.5-moe": (
        "qwen35moe", DELTA | {"expert_shared_feed_forward_length": 20}, {},
    ),
}  # fmt: skip


def by_turns(array, keys, size, start=0):
    """Value heads, of the first dimension, in turns of their key heads."""
    kept, values = np.split(array, [start])
    heads = values.reshape(keys, -1, size, *values.shape[1:])
    return np.concatenate([kept, heads.swapaxes(0, 1).reshape(values.shape)])


def as_written(name, array, config):
    """What llama.cpp's converter makes of a tensor."""
    name = name.partition(".layers.")[2].partition(".")[2] or name
    if name == "mlp.shared_expert_gate.weight":
        return array.squeeze(0)
    if not name.startswith("linear_attn."):
        return array + 1 if name.endswith("norm.weight") else array
    keys, size = config.delta_key_heads, config.delta_value_dim
    match name.removeprefix("linear_attn."):
        case "norm.weight":
            return array
        case "A_log":
            return by_turns(-np.exp(array), keys, 1)
        case "dt_bias" | "in_proj_a.weight" | "in_proj_b.weight":
            return by_turns(array, keys, 1)
        case "in_proj_z.weight":
            return by_turns(array, keys, size)
        case "out_proj.weight":
            return by_turns(array.T, keys, size).T
        case _:  # queries and keys are left alone
            start = 2 * keys * config.delta_key_dim
            return by_turns(array, keys, size, start).squeeze()


@pytest.mark.parametrize("name", CASES)
def test_what_the_converter_changes_is_undone(name, tmp_path):
    """The model is the one that transformers reads, and Gemma's tokenizer."""
    architecture, metadata, more = CASES[name]
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}TextConfig")
    theirs = random(
        getattr(transformers, f"{family}ForCausalLM"),
        config(**SHAPE | fields | more),
    )
    theirs.save_pretrained(tmp_path / "hub")
    want, _ = load(tmp_path / "hub")
    gemma = architecture == "gemma3"
    path = write_gguf(
        tmp_path / "m.gguf", want, architecture=architecture,
        metadata=IDS | {f"{architecture}.{k}": v for k, v in metadata.items()},
        vocabulary=(None if gemma else "qwen35", MERGES, PIECES, KINDS),
        extra=FURTHER if name == "qwen3.5" else None, convert=as_written,
    )  # fmt: skip
    reader = {"gguf_file": path.name, "dtype": torch.float32}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **reader)
    tensors = back.state_dict()
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(tensors.pop(key), value, atol=1e-6)
    assert not tensors

    got, tokenizer = load(path)
    assert got.config == want.config
    for key, array in want.arrays.items():
        np.testing.assert_allclose(got.arrays[key], array, atol=1e-6)
    if not gemma:  # byte-level, in test_gguf.py
        return
    same = transformers.AutoTokenizer.from_pretrained(tmp_path, **reader)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == same(text).input_ids, text
        assert tokenizer.decode(ids) == same.decode(ids)
    # Of one size llama.cpp scales scores by another rule.
    sizes = {f"gemma3.attention.{name}_length": 16 for name in ("key", "value")}
    file = open_gguf(path)
    for layers, scalar in ((34, 16), (62, 8)):
        changed = sizes | {"gemma3.block_count": layers}
        other = dataclasses.replace(file, metadata=file.metadata | changed)
        assert gguf_config(other).query_scalar == scalar
