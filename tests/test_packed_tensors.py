"""MXFP4 weights, and parts of tensors that hold several parameters."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_files import assert_same, make
from tiny_configs import config_of

from topd_jax.models import load, save_model
from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.fused import TensorInfo, split_fused
from topd_jax.models.io.mxfp4 import expand_mxfp4
from topd_jax.models.io.weights import file_tensors

# E2M1 by hand: sign, then 0 and seven steps.
NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NUMBERS += [-x for x in NUMBERS]


def expanded(blocks, scales):
    """[E, out, in], a number at a time."""
    experts, rows, groups = scales.shape
    out = np.empty((experts, rows, groups * 32), np.float32)
    for e, r, g, i in np.ndindex(experts, rows, groups, 32):
        byte = int(blocks[e, r, g, i // 2])
        bits = byte >> 4 if i % 2 else byte & 15
        power = 2.0 ** (int(scales[e, r, g]) - 127)
        out[e, r, g * 32 + i] = NUMBERS[bits] * power
    return out


def packed(rng, experts, rows, inputs):
    blocks = rng.integers(0, 256, (experts, rows, inputs // 32, 16), np.uint8)
    scales = rng.integers(120, 132, blocks.shape[:3]).astype(np.uint8)
    return blocks, scales


def test_a_file_of_mxfp4_holds_the_numbers_that_it_says(tmp_path):
    config = config_of("gpt_oss")
    path = save_model(make(config), tmp_path / "m")
    file, rng = path / "model.safetensors", np.random.default_rng(0)
    tensors, want = load_file(file), {}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.experts."
        for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
            del tensors[stem + name]
            blocks, scales = packed(rng, config.experts, rows, 32)
            tensors[f"{stem}{name}_blocks"] = blocks
            tensors[f"{stem}{name}_scales"] = scales
            want[name, layer] = expanded(blocks, scales)
    save_file(tensors, file, metadata={"format": "pt"})
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(fields))
    got = load(path)[0].arrays
    for layer in range(3):
        both = np.swapaxes(want["gate_up_proj", layer], 1, 2)
        np.testing.assert_array_equal(got["expert_gate"][layer], both[..., ::2])
        np.testing.assert_array_equal(got["expert_up"][layer], both[..., 1::2])
        down = np.swapaxes(want["down_proj", layer], 1, 2)
        np.testing.assert_array_equal(got["expert_down"][layer], down)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="down_proj_blocks"):
        load(path)


def test_any_part_is_the_part_of_the_whole():
    """As a device of a mesh reads it: some inputs of some outputs."""
    rng = np.random.default_rng(1)
    blocks, scales = packed(rng, 4, 48, 64)
    tensors = {"x_blocks": blocks, "x_scales": scales}
    infos = {n: TensorInfo(x.shape, "U8") for n, x in tensors.items()}
    shown, read = expand_mxfp4(infos, lambda name, index: tensors[name][index])
    assert shown == {"x": TensorInfo((4, 64, 48), "float32")}
    part = read("x", (slice(1, 3), slice(30, 50), slice(7, 9)))
    whole = np.swapaxes(expanded(blocks, scales), 1, 2)
    np.testing.assert_array_equal(part, whole[1:3, 30:50, 7:9])

    for name, tensor, shape in (
        ("gpt_oss", "mlp.experts.gate_up_proj", (5, 32, 64)),
        ("phi3", "self_attn.qkv_proj.weight", (80, 48)),
    ):
        family, tensor = FAMILIES[name], f"model.layers.2.{tensor}"
        rows, whole = file_tensors(config_of(name), family), rng.random(shape)
        shown, read = split_fused(
            {tensor: TensorInfo(shape, "float32")},
            lambda _, index, whole=whole: whole[index], rows, family.fused,
        )  # fmt: skip
        assert {n: rows[n][2] for n in shown} == {
            n: info.shape for n, info in shown.items()
        }
        parts = {
            n: read(n, tuple(slice(3, 6) for _ in info.shape))
            for n, info in shown.items()
        }
        if name == "phi3":
            k = parts["model.layers.2.self_attn.k_proj.weight"]
            np.testing.assert_array_equal(k, whole[51:54, 3:6])
        else:
            up = parts["model.layers.2.mlp.experts.1.up_proj.weight"]
            np.testing.assert_array_equal(up, whole[1, 3:6, 7:13:2].T)


def test_the_text_beside_images_in_the_older_spelling(tmp_path):
    model = make(config_of("mistral").replace(tied=False))
    path = save_model(model, tmp_path / "m", model_type="mistral")
    file, config = path / "model.safetensors", path / "config.json"
    others = "vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight"
    tensors = {other: np.ones(3, np.float32) for other in others}
    for tensor, array in load_file(file).items():
        own = tensor.replace("model.", "language_model.model.", 1)
        own = own.replace("lm_head.", "language_model.lm_head.", 1)
        tensors[own] = array
    save_file(tensors, file, metadata={"format": "pt"})
    whole = {
        "model_type": "mistral3", "text_config": json.loads(config.read_text()),
        "vision_config": {}, "tie_word_embeddings": False,
    }  # fmt: skip
    config.write_text(json.dumps(whole))
    assert_same(load(path)[0], model)
