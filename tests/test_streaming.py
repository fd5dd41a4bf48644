"""What is read of a file, what the host holds meanwhile, what is shown."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from children import simulated
from safetensors.numpy import save_file
from small_files import LLAMA, assert_same, make

from topd_jax.models import (
    DecoderConfig,
    load,
    parameter_table,
    save_model,
)
from topd_jax.models.io import streaming, weights
from topd_jax.models.io.hub_config import config_json
from topd_jax.models.io.weights import (
    Placement,
    TensorInfo,
    assemble,
    disassemble,
    file_tensors,
)

MB = 1 << 20


def counted(model):
    """A reader of a model's tensors, and how often each number was read."""
    tensors = dict(disassemble(model))
    counts = {name: np.zeros(x.shape, int) for name, x in tensors.items()}

    def read(name, index):
        counts[name][index] += 1
        return tensors[name][index]

    return read, counts


def infos(model):
    return {n: TensorInfo(x.shape, "float32") for n, x in disassemble(model)}


@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_every_number_is_read_once_whatever_the_pieces(piece, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", piece)
    read, counts = counted(make(LLAMA))
    model = assemble(LLAMA, infos(make(LLAMA)), read, Placement())
    assert_same(model, make(LLAMA))
    assert all((n == 1).all() for n in counts.values())


# Which part of q, [layers, embed, heads, head_dim], two devices hold, and the
# part of q_proj, [heads x head_dim, embed], that follows.
PARTS = {
    "both": (np.s_[:, 8:16, 2:4], np.s_[16:32, 8:16]),
    "layers": (np.s_[1:2, :], np.s_[:, :]),
    # Not one range in the file: read wider, kept as asked.
    "head_dim": (np.s_[:, :, 1:3, 4:8], np.s_[8:24, :]),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_process_reads_what_its_devices_hold(part, monkeypatch):
    index, in_file = PARTS[part]
    model = make(LLAMA)
    q = np.asarray(model.arrays["q"])
    whole = (*index, *[slice(None)] * (4 - len(index)))
    # Two devices of this process hold the same part; others hold the rest.
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, read: [read(whole), read(whole)],
    )
    read, counts = counted(model)
    sources = [
        (tensor, place)
        for tensor, (name, place, _) in file_tensors(LLAMA).items()
        if name == "q"
    ]
    for array in streaming.stream(
        "q", q.shape, "float32", file_tensors(LLAMA), read, "spread"
    ):
        np.testing.assert_array_equal(array, q[index])
    for tensor, place in sources:
        want = np.zeros(counts[tensor].shape, int)
        if place[0] in range(3)[whole[0]]:
            want[in_file] = 1
        np.testing.assert_array_equal(counts[tensor], want)


def test_a_parameter_can_be_changed_as_soon_as_it_is_placed():
    model, seen = make(LLAMA), []

    def read(name, index):
        seen.append(name)
        return tensors[name][index]

    def finish(name, array):
        seen.append(name)
        return array * 2

    tensors = dict(disassemble(model))
    got = assemble(LLAMA, infos(model), read, Placement(finish=finish))
    np.testing.assert_array_equal(got.arrays["q"], model.arrays["q"] * 2)
    assert [n for n in seen if n in model.arrays] == [*parameter_table(LLAMA)]
    # Before the next one is read.
    following = "model.layers.0.self_attn.k_proj.weight"
    assert seen.index("q") < seen.index(following)


def test_a_bar_of_bytes_for_large_models_only(tmp_path, monkeypatch, capfd):
    path = save_model(make(LLAMA), tmp_path / "some-model")
    load(path)
    capfd.readouterr()  # what transformers says of a config, once
    load(path)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(weights, "_SHOWN_BYTES", 0)
    load(path)
    out, err = capfd.readouterr()
    assert out == ""
    assert "some-model: 100%" in err
    assert "kB/s" in err or "MB/s" in err
    monkeypatch.setattr(weights.hosts, "is_first", lambda: False)
    load(path)
    assert capfd.readouterr() == ("", "")


LARGE = DecoderConfig(
    vocab_size=4096, layers=4, width=1024, heads=8, kv_heads=4, head_dim=128,
    mlp_width=8192,
)  # fmt: skip


@pytest.fixture
def large(tmp_path_factory):
    """220 MB of half precision in two files, of numbers that do not matter."""
    path = tmp_path_factory.mktemp("large")
    (path / "config.json").write_text(json.dumps(config_json(LARGE)))
    pool = np.random.default_rng(0).random(20 * MB, np.float32) - 0.5
    pool = pool.astype(ml_dtypes.bfloat16)
    tensors = {
        name: pool[: np.prod(shape)].reshape(shape)
        for name, (_, _, shape) in file_tensors(LARGE).items()
    }
    names, owner = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in part}, path / file)
        owner |= dict.fromkeys(part, file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": owner}))
    return path


def anonymous(pid):
    """Bytes of a process that no file backs, as the kernel counts them.

    Pages of a mapped file are left out: the kernel drops them at will.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    found = [x for x in status.splitlines() if x.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else 0  # it has died


def watched_load(path, small):
    """Loads in a process of its own; (peak growth in bytes, its words)."""
    here = Path(__file__).parent
    paths = [str(here.parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [sys.executable, here / "streamed_load.py", path, small],
        env=os.environ
        | {
            "XLA_FLAGS": simulated(8),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # children.py says why
            # What is freed goes back at once, and not when glibc likes.
            "MALLOC_MMAP_THRESHOLD_": "1000000",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "ready\n"
        os.set_blocking(child.stdout.fileno(), False)
        before = peak = anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        line = ""
        while not line.endswith("\n") and child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.001)
            line += child.stdout.readline()  # as much as there is
    assert child.returncode == 0
    return peak - before, json.loads(line)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc to measure with"
)
def test_eight_devices_hold_a_model_and_the_host_one_parameter(large, tmp_path):
    small = save_model(make(LLAMA), tmp_path / "small")
    growth, found = watched_load(large, small)
    held, largest = found["held"], found["largest"]
    assert held <= growth + largest  # the measure sees what is held
    assert growth <= held + 1.2 * largest
