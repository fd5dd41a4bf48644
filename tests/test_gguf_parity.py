"""GGUF files whose tensors llama.cpp changes, read by transformers and by us.

Needs torch (the ``parity`` extra). The files are written with the ``gguf``
package as llama.cpp's converter writes them; that transformers reads back the
model shows that they are.
"""

import dataclasses

import gguf
import numpy as np
import pytest
from tiny_configs import MODELS, SHAPE, VOCAB
from tiny_families import random, torch, transformers

from topd_jax.models import load
from topd_jax.models.io.gguf import gguf_config, open_gguf

BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = [
    "<pad>", "<eos>", "<bos>", "<unk>", *BYTES, "\n", "  ", "   ", "ab",
    "\u2581a", "\u2581ab", "abc", "bc", "cc", "\u2581", "a", "b", "c", ".",
    "<turn>",
]  # fmt: skip
PIECES += [f"[{i}]" for i in range(VOCAB - len(PIECES))]
KINDS = [3, 3, 3, 2, *[6] * 256, *[4] * 3, *[1] * 11, 3]
KINDS += [5] * (VOCAB - len(KINDS))
TEXTS = ("ab abc  bccc.", "   a\nb  ", "caf\u00e9 <turn>ab")

# Layers that predict further tokens, which are not read.
FURTHER = "nextn_predict_layers"
DELTA = {
    "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2,
    "ssm.time_step_rank": 4, "ssm.inner_size": 40, "rope.dimension_count": 8,
    "full_attention_interval": 2, "rope.dimension_sections": [2, 1, 1, 0],
}  # fmt: skip
EXPERTS = {
    "expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24,
    "expert_shared_feed_forward_length": 20,
}  # fmt: skip
WINDOW = {
    "attention.sliding_window": 5, "attention.sliding_window_pattern": 3,
    "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    "rope.freq_base_swa": 300.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
# name -> (architecture, metadata, base, other fields of the model)
CASES = {
    "gemma3": (
        "gemma3", WINDOW, 1e5,
        {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "qwen3.5": ("qwen35", DELTA | {FURTHER: 2}, 500.0, {}),
    "qwen3.5-moe": ("qwen35moe", DELTA | EXPERTS, 500.0, {}),
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
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
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
            start = 2 * keys * config.linear_key_head_dim
            return by_turns(array, keys, size, start).squeeze()


def split_experts(tensors):
    """Files have gates and ups apart."""
    for name, value in tensors.items():
        stem = name.removesuffix("experts.gate_up_proj")
        if stem == name:
            yield name, value.numpy()
            continue
        for part, half in zip(("gate", "up"), value.chunk(2, 1), strict=True):
            yield f"{stem}experts.{part}_proj", half.numpy()


def write(path, architecture, model, metadata, base):
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    layers, further = c.num_hidden_layers, metadata.get(FURTHER, 0)
    writer.add_block_count(layers + further)
    for i in range(layers, layers + further):
        writer.add_tensor(f"blk.{i}.nextn.enorm.weight", np.ones(3, np.float32))
    writer.add_context_length(77)
    writer.add_embedding_length(c.hidden_size)
    if architecture != "qwen35moe":
        writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(base)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    add = {int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types(KINDS)
    if architecture != "gemma3":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen35")
        writer.add_token_merges(["a b", "ab c"])
    for number, kind in enumerate(("pad", "eos", "bos", "unk")):
        getattr(writer, f"add_{kind}_token_id")(number)
    numbers = {n: k for k, n in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], layers)
    for name, array in split_experts(model.state_dict()):
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        known = name.replace("attn.dt_bias", "attn.dt_proj.bias")
        known += ".weight" if ".experts." in name else ""
        tensor = table.get_name(known, (".weight", ".bias"))
        array = as_written(name, array, c)
        writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", CASES)
def test_what_the_converter_changes_is_undone(name, tmp_path):
    """The model is the one that transformers reads, and Gemma's tokenizer."""
    architecture, metadata, base, more = CASES[name]
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}TextConfig")
    theirs = random(
        getattr(transformers, f"{family}ForCausalLM"),
        config(**SHAPE | fields | more),
    )
    theirs.save_pretrained(tmp_path / "hub")
    path = tmp_path / "m.gguf"
    write(path, architecture, theirs, metadata, base)
    reader = {"gguf_file": path.name, "dtype": torch.float32}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **reader)
    tensors = back.state_dict()
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(tensors.pop(key), value, atol=1e-6)
    assert not tensors

    want, _ = load(tmp_path / "hub")
    got, tokenizer = load(path)
    assert got.config == want.config
    for key, array in want.arrays.items():
        np.testing.assert_allclose(got.arrays[key], array, atol=1e-6)
    if architecture != "gemma3":  # byte-level, in test_gguf.py
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
