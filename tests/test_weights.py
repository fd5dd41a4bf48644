"""Hugging Face directories in and out, students, fingerprints."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from small_files import LLAMA, QWEN, assert_same, edit_config, make

from topd_jax import models
from topd_jax.models import (
    Decoder,
    drop_layers,
    fingerprint,
    load,
    parameter_table,
    save_model,
)
from topd_jax.models.io.huggingface import resolve
from topd_jax.models.io.loading import shape_of


@pytest.fixture
def saved(tmp_path):
    return save_model(make(LLAMA), tmp_path / "model")


def test_round_trip_in_shards(tmp_path):
    model = make(QWEN)
    size = sum(x.nbytes for x in model.arrays.values())
    out = save_model(model, tmp_path / "m", max_shard_bytes=size // 4 + 1)
    assert len(list(out.glob("*.safetensors"))) > 1
    back, tokenizer = load(out)
    assert tokenizer is None
    assert_same(back, model)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"m"}, "nothing is left beside the directory"


def test_half_precision_files(tmp_path):
    saved = save_model(make(LLAMA), tmp_path / "m", dtype="float16")
    model = load(saved, param_dtype="bfloat16", dtype="bfloat16")[0]
    assert model.config.dtype == "bfloat16"
    want = make(LLAMA).arrays["up"].astype("float16").astype("bfloat16")
    assert model.arrays["up"].dtype == "bfloat16"
    np.testing.assert_array_equal(model.arrays["up"], want)


def test_all_faulty_tensors_are_named_at_once(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((64, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    tensors["model.layers.2.mlp.gate_proj.weight"] = np.ones((64, 32), np.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        load(saved)[0]
    message = str(error.value)
    for part in (
        "missing (2): ", "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight", "not expected (2): ",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        f"{name} is [32, 16], not [16, 32]",
        "model.layers.2.mlp.gate_proj.weight is I8",
    ):  # fmt: skip
        assert part in message, part


def test_tied_head_is_tolerated_only_if_it_is_the_embedding(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
    save_file(tensors, path)
    assert_same(load(saved)[0], make(LLAMA))
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from"):
        load(saved)[0]
    edit_config(saved, tie_word_embeddings=False)
    model = load(saved)[0]
    np.testing.assert_array_equal(model.head, tensors["lm_head.weight"])


def test_experts_in_one_tensor_are_read_as_well(tmp_path):
    """As transformers 5 holds them; every version reads what we write."""
    config = dataclasses.replace(
        QWEN, experts=3, experts_per_token=2, expert_width=24
    )
    out = save_model(make(config), tmp_path / "m")
    tensors = load_file(out / "model.safetensors")
    for layer in range(config.layers):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack(
                [tensors.pop(f"{stem}{e}.{m}_proj.weight") for e in range(3)]
            )
            for m in ("gate", "up", "down")
        )
        tensors[f"{stem}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{stem}down_proj"] = down
    save_file(tensors, out / "model.safetensors")
    assert_same(load(out)[0], make(config))


def test_hub_names(monkeypatch, saved):
    calls = []

    def download(name, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns, ignore_patterns))
        if name == "no/such":
            raise ConnectionError("offline")
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(load("owner/name")[0], make(LLAMA))
    assert calls[0][0] == "owner/name"
    assert "*.safetensors" in calls[0][1]
    files = ["model-1-of-2.safetensors", "adapter_model.safetensors"]
    twice = ["consolidated.safetensors", "original/model.safetensors"]
    kept = filter_repo_objects(
        files + twice, allow_patterns=calls[0][1], ignore_patterns=calls[0][2]
    )
    assert list(kept) == files
    with pytest.raises(ValueError, match="the hub did not give it"):
        resolve("no/such")
    for path in ("./no/such", "/no/such", "nothing", "a/b/c"):
        with pytest.raises(ValueError, match="not a hub name"):
            resolve(path)
    with pytest.raises(ValueError, match="is a file"):
        resolve(saved / "config.json")


def test_drop_layers_owns_its_arrays():
    model = make(QWEN)
    student = drop_layers(model, [0, 2])
    assert student.config == dataclasses.replace(QWEN, layers=2)
    sliding = QWEN.replace(window=5, sliding=(True, False, True))
    assert sliding.keep_layers([0, 1]).sliding == (True, False)
    for array in student.arrays.values():
        array.delete()  # as donation does
    assert np.isfinite(model.head).all()


def test_drop_layers_refuses():
    for keep in ([], [2, 0], [0, 0], [3], [-1, 0]):
        with pytest.raises(ValueError, match="ascending layer indices"):
            drop_layers(make(LLAMA), keep)


def test_fingerprint_sees_every_bit_and_every_place():
    model = make(LLAMA)
    want = fingerprint(model)
    assert len(want) == 64
    assert fingerprint(make(LLAMA)) == want
    # Neither how it computes nor how long rows are.
    lazy = dataclasses.replace(LLAMA, remat="full", unroll=3, long_rope=True)
    assert fingerprint(Decoder(lazy, model.arrays)) == want
    seen = {want}
    for name, array in model.arrays.items():
        flat = np.asarray(array).ravel().copy()
        flat[-1] = np.nextafter(flat[-1], 9)
        swapped = np.asarray(array).ravel().copy()
        swapped[:2] = swapped[1::-1]
        for other in (flat, swapped):
            arrays = model.arrays | {
                name: jnp.asarray(other.reshape(array.shape))
            }
            seen.add(fingerprint(Decoder(LLAMA, arrays)))
    for change in ({"rope_theta": 1e4}, {"norm_eps": 1e-6}):
        config = dataclasses.replace(LLAMA, **change)
        seen.add(fingerprint(Decoder(config, model.arrays)))
    assert len(seen) == 1 + 2 * len(model.arrays) + 2


@pytest.mark.parametrize(
    ("name", "total"),  # as the model cards say
    [("Qwen/Qwen3-8B", 8.19e9), ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.53e9)],
)
def test_published_shapes_have_the_published_parameters(name, total):
    config = shape_of(name, dtype="bfloat16")
    table = parameter_table(config).values()
    count = sum(math.prod(row.shape) for row in table)
    assert count == pytest.approx(total, rel=2e-3)
    assert config.dtype == "bfloat16"


def test_a_shape_needs_no_weights(saved, tmp_path, monkeypatch):
    (saved / "model.safetensors").unlink()
    got = shape_of(str(saved), remat="full")
    assert got == dataclasses.replace(LLAMA, remat="full")
    with pytest.raises(ValueError, match="config.json.*Qwen3-8B"):
        shape_of(str(tmp_path))
    held = {"owner/new": str(saved / "config.json")}
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file: held[name]
    )
    # Where several devices choose their mesh, before anything is loaded.
    assert shape_of("owner/new") == LLAMA
    with pytest.raises(ValueError, match="no shape for"):
        shape_of("nobody/has-this-model")


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(models.__file__).parent / "README.md").read_text()
    held = {}
    exec(text.split("```python\n")[1].split("```")[0], held)
    assert held["logits"].shape == (1, 3, 64)
    assert held["again"].arrays["q"].dtype == jnp.bfloat16
