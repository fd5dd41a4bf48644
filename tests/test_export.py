"""Directories are written whole or not at all."""

import contextlib
import dataclasses
import errno
import json
from types import SimpleNamespace

import pytest
from small_files import LLAMA, QWEN, assert_same, make

from topd_jax.cli import export as command
from topd_jax.models import load, save_model
from topd_jax.models.settings import ModelSettings


@pytest.fixture
def saved(tmp_path):
    return save_model(make(LLAMA), tmp_path / "model")


def test_a_destination_must_be_free(saved, tmp_path):
    other = make(LLAMA, seed=1)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_model(other, saved)
    assert_same(load(saved)[0], make(LLAMA))
    (tmp_path / "empty").mkdir()
    assert_same(load(save_model(other, tmp_path / "empty"))[0], other)


@pytest.mark.parametrize("when", ["during", "renaming"])
def test_full_disk_leaves_nothing(when, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    name, change = {
        "during": ("topd_jax.models.io.export.save_file", fail),
        "renaming": ("pathlib.Path.replace", fail),
    }[when]
    monkeypatch.setattr(name, change)
    with pytest.raises(OSError, match="nothing there was changed") as error:
        save_model(make(LLAMA), tmp_path / "model")
    assert error.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())


def test_export_refuses_what_a_family_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="qk_norm=True cannot be written"):
        save_model(make(QWEN), tmp_path / "x", model_type="llama")
    odd = dataclasses.replace(LLAMA, heads=6, kv_heads=2)
    with pytest.raises(ValueError, match="not a multiple of the number of att"):
        save_model(make(odd), tmp_path / "x", model_type="llama")
    with pytest.raises(ValueError, match="hidden_size"):
        save_model(make(LLAMA), tmp_path / "x", extra={"hidden_size": 3})
    assert not any(tmp_path.iterdir())


def test_how_a_decoder_computes_is_not_written(tmp_path):
    """The shipped configs train by kernels."""
    how = dict(attention="flash", remat="full", unroll=2, dtype="bfloat16")
    kernels = dataclasses.replace(QWEN, **how)
    saved = save_model(make(kernels), tmp_path / "model")
    assert_same(load(saved)[0], make(QWEN))


def test_an_export_is_for_rows_as_long_as_its_source(tmp_path, monkeypatch):
    """Not for the default of its family, nor for its tokenizer's limit."""
    lengths = {"max_position_embeddings": 99_999}
    source = save_model(make(LLAMA), tmp_path / "source", extra=lengths)
    tokenizer = SimpleNamespace(
        eos_ids=(1,), bos_id=None, pad_id=0, save_pretrained=lambda _: None
    )
    run = SimpleNamespace(tokenizer=tokenizer)
    opened = contextlib.nullcontext((run, make(LLAMA, seed=1), 3))
    monkeypatch.setattr(command, "open_run", lambda *_: opened)
    settings = SimpleNamespace(student=ModelSettings(source=str(source)))
    command.export(settings, tmp_path, "latest", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["max_position_embeddings"] == 99_999
    assert fields["eos_token_id"] == 1
