"""Every quantisation of GGUF files, against its published block layout.

The decoders below are written from the structures of ggml (``ggml-common.h``)
and its reference loops (``ggml-quants.c``), one number of a block at a time.
"""

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from small_files import LLAMA, QWEN, assert_same, make, permuted, write_gguf

from topd_jax.models.io.gguf import _expand, load_gguf, open_gguf
from topd_jax.models.io.weights import assemble, file_tensors

WIDE = {"layers": 2, "width": 256, "mlp_width": 512}
FAMILIES = {
    "llama": dataclasses.replace(LLAMA, **WIDE, head_dim=64, tied=False),
    # The heads together are wider than the model.
    "qwen3": dataclasses.replace(QWEN, **WIDE, head_dim=128),
}
KINDS = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K,
    Kind.Q6_K, Kind.Q8_0,
)  # fmt: skip
MATRICES = (
    "embedding", "output", "q", "k", "v", "o", "gate", "up", "down",
)  # fmt: skip


def halves(raw, *offsets):
    """The float16 at some offsets of every block, as float32."""
    return [
        np.ascontiguousarray(raw[:, i : i + 2]).view(np.float16)[:, 0]
        .astype(np.float32)
        for i in offsets
    ]  # fmt: skip


def decode_q4_0(raw, out):
    (d,) = halves(raw, 0)
    for j in range(16):
        byte = raw[:, 2 + j].astype(np.int32)
        out[:, j] = d * ((byte & 15) - 8)
        out[:, j + 16] = d * ((byte >> 4) - 8)


def decode_q4_1(raw, out):
    d, m = halves(raw, 0, 2)
    for j in range(16):
        byte = raw[:, 4 + j].astype(np.int32)
        out[:, j] = d * (byte & 15) + m
        out[:, j + 16] = d * (byte >> 4) + m


def decode_q8_0(raw, out):
    (d,) = halves(raw, 0)
    for j in range(32):
        out[:, j] = d * raw[:, 2 + j].view(np.int8)


def scale_and_least(scales, j):
    """``get_scale_min_k4``: six bits each, packed in twelve bytes."""
    q = scales.astype(np.int32)
    if j < 4:
        return q[:, j] & 63, q[:, j + 4] & 63
    return (
        (q[:, j + 4] & 15) | ((q[:, j - 4] >> 6) << 4),
        (q[:, j + 4] >> 4) | ((q[:, j] >> 6) << 4),
    )


def decode_q4_k(raw, out, high=None):
    d, least = halves(raw, 0, 2)
    scales, low = raw[:, 4:16], raw[:, 16 if high is None else 48 :]
    for part in range(8):
        scale, m = scale_and_least(scales, part)
        for j in range(32):
            byte = low[:, 32 * (part // 2) + j].astype(np.int32)
            q = byte >> 4 if part % 2 else byte & 15
            if high is not None:
                q += 16 * ((high[:, j].astype(np.int32) >> part) & 1)
            out[:, 32 * part + j] = d * scale * q - least * m


def decode_q5_k(raw, out):
    decode_q4_k(raw, out, high=raw[:, 16:48])


def decode_q6_k(raw, out):
    (d,) = halves(raw, 208)
    scales = raw[:, 192:208].view(np.int8)
    wide = raw.astype(np.int32)
    for half in range(2):
        low, high = wide[:, 64 * half :], wide[:, 128 + 32 * half :]
        for part in range(4):
            for j in range(32):
                q = low[:, j + 32 * (part % 2)]
                q = q >> 4 if part >= 2 else q & 15
                q = q | (((high[:, j] >> (2 * part)) & 3) << 4)
                scale = scales[:, 8 * half + 2 * part + j // 16]
                out[:, 128 * half + 32 * part + j] = d * scale * (q - 32)


DECODERS = {
    Kind.Q4_0: (decode_q4_0, (0,)),
    Kind.Q4_1: (decode_q4_1, (0, 2)),
    Kind.Q8_0: (decode_q8_0, (0,)),
    Kind.Q4_K: (decode_q4_k, (0, 2)),
    Kind.Q5_K: (decode_q5_k, (0, 2)),
    Kind.Q6_K: (decode_q6_k, (208,)),
}


def random_blocks(shape, kind, rng):
    """(the bytes of a tensor, the numbers that they stand for)."""
    if kind == Kind.F32:
        x = rng.normal(size=shape).astype(np.float32)
        return x, x
    if kind == Kind.F16:
        x = rng.normal(size=shape).astype(np.float16)
        return x, x.astype(np.float32)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // numbers * size), np.uint8)
    if kind == Kind.BF16:
        raw[:, 1::2] &= 0xBF  # no infinity
        wide = raw.view(np.uint16).astype(np.uint32) << 16
        return raw, wide.view(np.float32)
    decode, offsets = DECODERS[kind]
    blocks = raw.reshape(-1, size)
    for at in offsets:  # random bytes could be no number
        scale = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    out = np.empty((len(blocks), numbers), np.float32)
    decode(blocks, out)
    return raw, out.reshape(shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kind_is_read_as_published(family, kind, tmp_path):
    config = FAMILIES[family]
    model, rng = make(config), np.random.default_rng(0)
    written = []

    def quantize(array, kind):
        raw, numbers = random_blocks(array.shape, kind, rng)
        written.append(numbers)
        return raw

    kinds = dict.fromkeys(MATRICES, kind)
    path = tmp_path / "m.gguf"
    if kind == Kind.F32:
        write_gguf(path, model)
        assert_same(load_gguf(path), model)
        return
    write_gguf(path, model, kinds, quantize=quantize)
    tensors = file_tensors(config, "gguf")
    quantised = [n for n, row in tensors.items() if row[0] in MATRICES]
    expected = dict(zip(quantised, written, strict=True))
    for name, array in expected.items():
        heads = {"q": config.heads, "k": config.kv_heads}.get(tensors[name][0])
        if family == "llama" and heads:  # not so qwen3
            # Where the converter puts row i, row i is taken from.
            order = permuted(np.arange(len(array))[:, None], heads)[:, 0]
            expected[name] = array[np.argsort(order)]
    file = open_gguf(path)
    for name in tensors:
        plain = np.asarray(file.tensors[name].data)
        expected.setdefault(name, plain)

    def read(name, index):
        return expected[name][index]

    assert_same(load_gguf(path), assemble(config, "gguf", read, label="m"))


def one_tensor(path, kind):
    rng = np.random.default_rng(1)
    raw, numbers = random_blocks((6, 1024), kind, rng)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path).tensors["t"], numbers


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "index",
    [np.s_[0:6, 0:1024], np.s_[2:3, 256:512], np.s_[1:5, 37:411],
     (np.array([4, 0, 2]), slice(1000, 1024))],
    ids=["all", "aligned", "inside", "rows"],
)  # fmt: skip
def test_a_part_is_expanded_alone(kind, index, tmp_path, monkeypatch):
    tensor, numbers = one_tensor(tmp_path / "t.gguf", kind)
    expanded = []
    whole = gguf.dequantize

    def counted(data, kind):
        out = whole(data, kind)
        expanded.append(out.size)
        return out

    monkeypatch.setattr(gguf, "dequantize", counted)
    want = numbers[index]
    np.testing.assert_array_equal(_expand(tensor, index), want)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    assert sum(expanded) < want.size + len(want) * 2 * block
