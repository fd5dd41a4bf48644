"""Directories are written whole or not at all."""

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from small_files import LLAMA, QWEN, assert_same, edit_config, make

from topd_jax.models import load, save_model


@pytest.fixture
def saved(tmp_path):
    return save_model(make(LLAMA), tmp_path / "model")


def test_destination_is_not_overwritten_unasked(saved, tmp_path):
    other = make(LLAMA, seed=1)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_model(other, saved)
    assert_same(load(saved)[0], make(LLAMA))
    save_model(other, saved, overwrite=True)
    assert_same(load(saved)[0], other)
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
    assert_same(load(saved)[0], make(LLAMA))


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
    got = load(out, param_dtype="bfloat16")[0]
    want = make(LLAMA).arrays["gate"].astype("bfloat16")
    np.testing.assert_array_equal(got.arrays["gate"], want)


def test_export_refuses_what_a_family_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="qk_norm=True cannot be written"):
        save_model(make(QWEN), tmp_path / "x", model_type="llama")
    odd = dataclasses.replace(LLAMA, heads=6, kv_heads=2)
    with pytest.raises(ValueError, match="not a multiple of the number of att"):
        save_model(make(odd), tmp_path / "x", model_type="llama")
    with pytest.raises(ValueError, match="hidden_size"):
        save_model(make(LLAMA), tmp_path / "x", extra={"hidden_size": 3})
    assert not any(tmp_path.iterdir())
