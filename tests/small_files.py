"""Tiny models, and files of them, that the tests of files share."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax

from topd_jax.models import (
    Decoder,
    DecoderConfig,
    causal_mask,
    parameter_table,
    unembed,
)
from topd_jax.models.io.weights import disassemble, file_tensors
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.step import init_state
from topd_jax.types import positions_of

LLAMA = DecoderConfig(
    vocab_size=50,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    rope_theta=5e5,
    norm_eps=1e-5,
)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True)
QWEN = dataclasses.replace(LLAMA, qk_norm=True, tied=False, head_dim=6)
# Recurrent layers beside gated attention, an expert that reads every token.
RECURRENT = DecoderConfig(
    vocab_size=50, layers=4, width=16, heads=4, kv_heads=2, head_dim=8,
    mlp_width=24, rope_theta=100.0, qk_norm=True, centered_norms=True,
    attention_gate=True, rotary_dim=4, recurrent=(True, False) * 2,
    delta_key_heads=2, delta_value_heads=4, delta_key_dim=4,
    delta_value_dim=6, delta_conv=3,
)  # fmt: skip


@functools.cache
def make(config, seed=0):
    """A decoder in which no two numbers are the same by construction."""
    # NumPy, because compiling a dozen random draws takes seconds.
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, row in parameter_table(config).items():
        if row.scale is None:
            draw = rng.uniform(0.5, 1.5, row.shape)
        else:
            draw = rng.normal(0, row.scale, row.shape)
        arrays[name] = jnp.asarray(draw, config.param_dtype)
    return Decoder(config, arrays)


@jax.jit
def logits_of(model, tokens, mask=None):
    """Logits of rows read without a cache; no mask: nothing is padding."""
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    hidden, cache = model(tokens, positions_of(mask), causal_mask(mask))
    assert cache is None
    return unembed(model.head, hidden)


def adapted(model, lora, seed=2):
    """The same model with adapters whose B is not zero."""
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(model.config, lora=lora)
    arrays = {
        name: jnp.asarray(rng.normal(0, 0.2, row.shape), jnp.float32)
        for name, row in parameter_table(config).items()
        if "_lora_" in name
    }
    return Decoder(config, model.arrays | arrays)


def assert_same(a, b):
    assert a.config == b.config
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def edit_config(directory, **changes):
    path = Path(directory) / "config.json"
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        fields[name] = value
        if value is ...:
            del fields[name]
    path.write_text(json.dumps(fields))


def save_run(workdir, model, step=3, folder="checkpoints", record=None):
    """The checkpoint of a run whose student is ``model``."""
    saved = Checkpoints(workdir / folder, 2)
    state = init_state(model, optax.adam(1e-3))
    if record is None:
        record = {"student": model.config.to_dict()}
    saved.save(step, state, jax.random.key(0), record)
    saved.close()
    return workdir


def permuted(rows, heads):
    """llama.cpp's reordering of q and k, written from its converter."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def small_vocabulary(size):
    """Of a GGUF file: pre-tokenizer, merges, tokens and their types."""
    byte_letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = ["<end>", "<pad>", *"0123456789", "Ġ", *byte_letters]
    tokens += ["ab", "ĠĠ", "<think>"]
    tokens += [f"[{i}]" for i in range(size - len(tokens))]
    types = [3, 3, *[1] * 39, 4, *[5] * (size - 42)]
    return "smollm", ["a b", "Ġ Ġ"], tokens, types


def gguf_tensors(model, arch, convert):
    """Tensors of its file by name, and the parameter that each belongs to."""
    config = model.config
    names = {n: k for k, n in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[arch], config.layers)
    tensors, owners, rows = {}, {}, file_tensors(config)
    for hub, array in disassemble(model):
        name, index, _ = rows[hub]
        stem = re.sub(r"experts\.\d+", "experts", hub)
        stem = stem.replace("attn.dt_bias", "attn.dt_proj.bias")
        tensor = table.get_name(stem, (".weight", ".bias"))
        owners[tensor] = name
        array = convert(hub, np.asarray(array), config)
        if len(index) == 2:  # experts go into one tensor
            array = [*tensors.get(tensor, ()), array]
        tensors[tensor] = array
    return tensors, owners


def write_gguf(
    path,
    model,
    kinds=None,
    metadata=None,
    permute=True,
    quantize=gguf.quantize,
    vocabulary=None,
    extra=None,
    architecture=None,
    convert=lambda name, array, config: array,
):
    """A GGUF file of ``model``; kinds: parameter -> quantisation."""
    c = model.config
    arch = "qwen2" if c.attention_bias else "llama"
    arch = "qwen3" if c.qk_norm else arch
    arch = architecture or ("qwen3moe" if c.experts else arch)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.layers)
    writer.add_context_length(77)
    writer.add_embedding_length(c.width)
    if arch != "qwen35moe":
        writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    add = {int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in (metadata or {}).items():
        add[type(value)](key, value)
    if c.experts:
        writer.add_expert_count(c.experts)
        writer.add_expert_used_count(c.experts_per_token)
        writer.add_expert_feed_forward_length(c.expert_width)
    pre, merges, tokens, types = vocabulary or small_vocabulary(c.vocab_size)
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    if pre:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tensors, owners = gguf_tensors(model, arch, convert)
    for tensor, array in (tensors | (extra or {})).items():
        name, array = owners.get(tensor), np.asarray(array)
        if permute and arch == "llama" and name in ("q", "k"):
            array = permuted(array, c.heads if name == "q" else c.kv_heads)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor, array)
        else:
            data = quantize(array, kind)
            writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
