"""config.json in and out, and directories written whole or not at all."""

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from small_files import LLAMA, QWEN, assert_same, edit_config, make

from topd_jax.models import save_model
from topd_jax.models.io.hub_config import config_json, decoder_config
from topd_jax.models.io.huggingface import load_model


@pytest.fixture
def saved(tmp_path):
    return save_model(make(LLAMA), tmp_path / "model")


def read(**changes):
    fields = config_json(LLAMA) | changes
    fields = {k: v for k, v in fields.items() if v is not ...}
    return decoder_config(fields, where="config.json")


def test_config_round_trip_and_both_rope_spellings():
    assert read() == LLAMA
    assert read(rope_theta=...) == LLAMA
    assert read(rope_parameters=...) == LLAMA
    assert read(rope_theta=..., rope_parameters=...).rope_theta == 10_000
    new = {"rope_type": "default", "rope_theta": 7.0}
    assert read(rope_theta=..., rope_parameters=new).rope_theta == 7
    assert read(rope_theta=7, rope_parameters=...).rope_theta == 7
    old = {"rope_scaling": {"type": "default"}, "rope_parameters": ...}
    assert read(rope_theta=7, **old).rope_theta == 7
    assert read(rope_scaling=None) == LLAMA


def test_config_defaults_are_the_familys():
    got = read(
        num_key_value_heads=...,
        head_dim=None,
        rms_norm_eps=...,
        tie_word_embeddings=...,
    )
    assert (got.kv_heads, got.head_dim, got.tied) == (4, 8, False)
    assert got.norm_eps == 1e-6
    got = read(model_type="qwen3", num_attention_heads=64, head_dim=...)
    assert (got.head_dim, got.qk_norm) == (128, True)


def test_harmless_fields_pass():
    extra = {
        "transformers_version": "5.0",
        "max_position_embeddings": 8192,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * 3,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "eos_token_id": [1, 2],
        "rope_interleaved": False,
    }
    assert read(**extra) == LLAMA


REFUSED = {
    "hidden_act": "relu",
    "attention_bias": "yes",
    "mlp_bias": 1,
    "attention_dropout": 0.1,
    "use_sliding_window": True,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "fp8"},
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5},
    "logit_softcapping": 30.0,
    "hidden_size": "32",
    "num_hidden_layers": 0,
    "rope_theta": -1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_and_unknown_fields_are_named(field):
    with pytest.raises(ValueError, match=field) as error:
        read(**{field: REFUSED[field]})
    value = REFUSED[field]
    if not isinstance(value, dict | list):
        assert repr(value) in str(error.value)


def test_all_faulty_fields_are_named_at_once():
    with pytest.raises(ValueError, match="cannot be read") as error:
        read(mlp_bias=1, frobnicate=3, vocab_size=...)
    for name in ("mlp_bias=1", "frobnicate=3", "vocab_size=None"):
        assert name in str(error.value)
    assert "ignore=('frobnicate',)" in str(error.value)
    fields = config_json(LLAMA) | {"frobnicate": 3}
    got = decoder_config(fields, where="x", ignore=("frobnicate",))
    assert got == LLAMA


def test_disagreeing_thetas_are_refused():
    with pytest.raises(ValueError, match="disagree"):
        read(rope_theta=1e6)


def test_unknown_model_type_lists_the_supported():
    with pytest.raises(ValueError, match=r"'gpt2'.*supported: .*llama"):
        read(model_type="gpt2")
    with pytest.raises(ValueError, match="model_type=None"):
        read(model_type=...)


def test_destination_is_not_overwritten_unasked(saved, tmp_path):
    other = make(LLAMA, seed=1)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_model(other, saved)
    assert_same(load_model(saved), make(LLAMA))
    save_model(other, saved, overwrite=True)
    assert_same(load_model(saved), other)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds no model"):
        save_model(other, tmp_path / "papers", overwrite=True)


@pytest.mark.parametrize("when", ["before", "during", "renaming"])
def test_full_disk_loses_nothing(when, saved, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path: type("U", (), {"free": 10})
        )
    elif when == "during":
        monkeypatch.setattr("topd_jax.models.io.export.save_file", fail)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path,
            "rename",
            lambda a, b: fail() if "partial" in a.name else rename(a, b),
        )
    with pytest.raises(OSError, match="nothing there was changed") as error:
        save_model(make(LLAMA, seed=1), saved, overwrite=True)
    assert error.value.errno == errno.ENOSPC
    assert {p.name for p in saved.parent.iterdir()} == {saved.name}
    assert_same(load_model(saved), make(LLAMA))


def test_export_inherits_ids_and_tokenizer_files(saved, tmp_path):
    edit_config(saved, max_position_embeddings=99, eos_token_id=[3, 4])
    (saved / "tokenizer.json").write_text("{}")
    (saved / "generation_config.json").write_text('{"top_k": 5}')
    out = save_model(
        make(LLAMA), tmp_path / "out", source=saved, extra={"pad_token_id": 7}
    )
    fields = json.loads((out / "config.json").read_text())
    assert fields["max_position_embeddings"] == 99
    assert (fields["eos_token_id"], fields["pad_token_id"]) == ([3, 4], 7)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "generation_config.json").read_text() == '{"top_k": 5}'


def test_export_in_half_precision(tmp_path):
    out = save_model(make(LLAMA), tmp_path / "out", dtype="bfloat16")
    got = load_model(out, param_dtype="bfloat16")
    want = make(LLAMA).arrays["gate"].astype("bfloat16")
    np.testing.assert_array_equal(got.arrays["gate"], want)


def test_export_refuses_what_a_family_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="qk_norm=True cannot be written"):
        save_model(make(QWEN), tmp_path / "x", model_type="llama")
    odd = dataclasses.replace(LLAMA, heads=6, kv_heads=2)
    with pytest.raises(ValueError, match="width=32 must be divisible by heads"):
        save_model(make(odd), tmp_path / "x")
    with pytest.raises(ValueError, match="hidden_size"):
        save_model(make(LLAMA), tmp_path / "x", extra={"hidden_size": 3})
    assert not any(tmp_path.iterdir())
