"""Adapter directories: what PEFT writes is read, what we write PEFT loads."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_files import LLAMA, QWEN, adapted, make

from topd_jax.models import Lora, load_adapter, save_adapter, save_model
from topd_jax.models.adapters import require_adapter
from topd_jax.models.config import LORA_TARGETS
from topd_jax.models.io.peft import CONFIG_FILE, TENSOR_FILE
from topd_jax.models.lora import split
from topd_jax.models.settings import ModelSettings

LORA = Lora(3, 6.0, LORA_TARGETS, rank_stabilized=True)


@pytest.fixture
def saved(tmp_path):
    return save_adapter(
        adapted(make(LLAMA), LORA), tmp_path / "adapter", base="owner/base"
    )


def edit(directory, **changes):
    path = directory / CONFIG_FILE
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("k", "o")])
def test_what_is_written_is_read(targets, tmp_path):
    lora = dataclasses.replace(LORA, targets=targets)
    want = adapted(make(QWEN), lora)
    path = save_adapter(want, tmp_path / "a", base="owner/base")
    got = load_adapter(make(QWEN), path)
    assert got.config == want.config
    for name, array in split(want)[0].arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


def test_half_precision_files_and_every_spelling_of_targets(saved):
    """Beside fields that change nothing."""
    tensors = load_file(saved / TENSOR_FILE)
    halves = {n: x.astype(jnp.bfloat16) for n, x in tensors.items()}
    save_file(halves, saved / TENSOR_FILE)
    edit(
        saved, use_dora=False, modules_to_save=None, rank_pattern={},
        lora_dropout=0.05, peft_version="0.21", revision="main",
        qalora_group_size=16, megatron_core="megatron.core",
    )  # fmt: skip
    for spelt in ("all-linear", r".*\.(q|k|v|o|gate|up|down)_proj", ...):
        if spelt is not ...:
            edit(saved, target_modules=spelt)
        got = load_adapter(make(LLAMA), saved)
        assert got.config.lora == LORA
        assert got.arrays["q_lora_a"].dtype == jnp.float32
        np.testing.assert_allclose(
            got.arrays["q_lora_a"],
            adapted(make(LLAMA), LORA).arrays["q_lora_a"],
            rtol=1e-2,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"), ("bias", "all"), ("use_dora", True),
        ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 4}),
        ("init_lora_weights", "pissa"), ("frobnicate", 3), ("r", 0),
        ("lora_alpha", None),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(saved, field, value):
    edit(saved, **{field: value})
    with pytest.raises(ValueError, match=f"cannot be read: {field}=") as error:
        load_adapter(make(LLAMA), saved)
    assert repr(value) in str(error.value)
    assert "merge_and_unload" in str(error.value)


def test_adapters_that_peft_would_not_apply_are_not_written(tmp_path):
    """Beside fused maps, and of the text beside images, whose names differ."""
    path = save_model(make(LLAMA), tmp_path / "n")
    require_adapter(ModelSettings(source=str(path), lora_rank=2))
    phi3 = LLAMA.replace(rotary_dim=4)
    gemma = LLAMA.replace(post_norms=True, qk_norm=True, centered_norms=True,
                          scaled_embedding=True)  # fmt: skip
    for kind, config, line in (
        ("phi3", phi3, r"'phi3' keeps .*qkv_proj.*--adapter"),
        ("gemma3_text", gemma, r"'gemma3' reads images.*--adapter"),
    ):
        path = save_model(make(config), tmp_path / kind, model_type=kind)
        settings = ModelSettings(source=str(path), lora_rank=2)
        if config is gemma:
            require_adapter(settings)
            text = json.loads((path / "config.json").read_text())
            whole = {"model_type": "gemma3", "text_config": text}
            (path / "config.json").write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=line):
            require_adapter(settings)


def test_tensors_that_do_not_fit_are_all_named(saved):
    tensors = load_file(saved / TENSOR_FILE)
    stem = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    del tensors[stem.format(0, "A")]
    tensors[stem.format(1, "B")] = np.zeros((5, 3), np.float32)
    tensors[stem.format(9, "A")] = np.zeros((3, 32), np.float32)
    save_file(tensors, saved / TENSOR_FILE)
    with pytest.raises(ValueError) as error:
        load_adapter(make(LLAMA), saved)
    text = str(error.value)
    assert f"missing (1): {stem.format(0, 'A')}" in text
    assert f"not expected (1): {stem.format(9, 'A')}" in text
    assert f"{stem.format(1, 'B')} is [5, 3], not [64, 3]" in text


def test_files_that_are_not_there_are_named(saved, tmp_path):
    (saved / TENSOR_FILE).rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no file .*convert adapter_model"):
        load_adapter(make(LLAMA), saved)
    with pytest.raises(ValueError, match="no model at"):
        load_adapter(make(LLAMA), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no adapters to write"):
        save_adapter(make(LLAMA), tmp_path / "x", base="b")
    with pytest.raises(ValueError, match="is not empty"):
        save_adapter(adapted(make(LLAMA), LORA), saved, base="b")
