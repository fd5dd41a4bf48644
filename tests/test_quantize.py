"""Quantised decoders: close, small, never float as a whole, refused in time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_files import LLAMA, logits_of, make, write_gguf

from topd_jax import models
from topd_jax.models import dequantize, drop_layers, fingerprint, load
from topd_jax.models.quantization import (
    as_floats,
    is_quantized,
    quantize,
    quantizer,
)
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

MIXTURE = LLAMA.replace(
    width=48, experts=4, experts_per_token=2, expert_width=40
)  # fmt: skip
MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}
TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, 40)


def parameter_bytes(model):
    """Bytes as a TPU holds them, two int4 a byte."""
    widths = {"int4": 0.5}
    return sum(
        x.size * widths.get(x.dtype.name, x.dtype.itemsize)
        for x in jax.tree.leaves(model.arrays)
    )


@jax.jit
def states(model):
    return logits_of(model, TOKENS)


# Largest divisors of 48, 40 and a head's 8 that are at most 32.
TILES = dict.fromkeys(("q", "k", "v", "expert_gate", "expert_up"), 24)
TILES |= {"o": 8, "expert_down": 20}


def by_hand(name, array, bits):
    """(array / scale, scale): a scale for some inputs, or for all."""
    x = np.asarray(array, np.float32)
    inputs = {"q": (1,), "k": (1,), "v": (1,), "o": (1, 2)}
    inputs = inputs.get(name, (x.ndim - 2,))
    if bits == 8:
        top = np.abs(x).max(axis=inputs, keepdims=True)
    else:
        axis, tile = inputs[-1], TILES[name]
        count = x.shape[axis] // tile
        parts = np.stack(np.split(np.abs(x), count, axis), axis)
        top = parts.max(axis=axis + 1, keepdims=True)
        top = np.repeat(top, tile, axis + 1).reshape(x.shape)
    scale = top / ((2**bits - 1) / 2)
    return x / scale, scale


@pytest.mark.parametrize(
    ("kind", "bits", "config"),
    [("int8", 8, LLAMA), ("int4", 4, MIXTURE)],
    ids=["dense", "mixture"],
)
def test_every_large_matrix_is_rounded_with_its_own_scales(kind, bits, config):
    model = make(config)
    small = quantize(model, kind)
    rounded = {n for n, x in small.arrays.items() if is_quantized(x)}
    experts = {n for n in model.arrays if n.startswith("expert_")}
    assert rounded == (MATRICES | experts) & set(model.arrays)
    for name, x in small.arrays.items():
        if name not in rounded:
            np.testing.assert_array_equal(x, model.arrays[name])
            continue
        exact, scale = by_hand(name, model.arrays[name], bits)
        integers = np.asarray(x.qvalue.astype(jnp.int8))
        assert x.qvalue.dtype == kind
        assert np.abs(integers - exact).max() < 0.5001
        np.testing.assert_allclose(
            as_floats(x, "float32"), integers * scale,
            rtol=1e-5 if kind == "int8" else 2**-8,
        )  # fmt: skip


def test_computes_as_its_floats_in_the_scan_and_unrolled():
    small = quantize(make(MIXTURE), "int4")
    want = states(dequantize(small))
    np.testing.assert_allclose(states(small), want, atol=1e-5)
    other = small.__class__(MIXTURE.replace(unroll=3), small.arrays)
    np.testing.assert_allclose(states(other), want, atol=1e-5)
    assert np.abs(states(make(MIXTURE)) - want).max() > 1e-4


def test_no_float_copy_of_a_stack_exists():
    """Nor of all layers' matrices; one layer's floats do."""
    config = LLAMA.replace(layers=8, width=64, mlp_width=256, head_dim=16)
    small = quantize(make(config), "int4")
    prompts = Prompts(TOKENS, jnp.ones_like(TOKENS, bool))
    programs = {
        "read": states,
        "write": jax.jit(
            lambda model: rollout(
                model, prompts, jax.random.key(0), max_new_tokens=4,
                temperature=1.0, eos_ids=(), pad_id=0,
            )
        ),
    }  # fmt: skip
    for name, program in programs.items():
        compiled = program.lower(small).compile()
        floats = {
            tuple(map(int, shape.split(",")))
            for shape in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]",
                                    compiled.as_text())
        }  # fmt: skip
        stack = 8 * 64 * 256
        assert max(np.prod(s) for s in floats) < stack, name
        whole = 4 * sum(small.arrays[n].qvalue.size for n in MATRICES)
        size = compiled.memory_analysis()
        assert size.temp_size_in_bytes < whole / 2, name
        assert size.argument_size_in_bytes < parameter_bytes(small) + 4096


def test_fingerprints_differ_by_kind_and_weight():
    model = make(LLAMA)
    kinds = [model, quantize(model, "int8"), quantize(model, "int4")]
    kinds.append(quantize(make(LLAMA, seed=1), "int8"))
    prints = [fingerprint(m) for m in kinds]
    assert len(set(prints)) == len(prints)
    assert fingerprint(quantize(model, "int4")) == prints[2]
    one = dict(kinds[2].arrays)
    q = one["q"]
    one["q"] = q.replace(qvalue=q.qvalue.at[0, 0, 0, 0].add(1))
    assert fingerprint(model.__class__(LLAMA, one)) != prints[2]


def test_layers_are_dropped_and_dtypes_cast():
    model = make(LLAMA)
    small = quantize(model, "int4")
    want = quantize(drop_layers(model, [0, 1]), "int4")
    assert fingerprint(drop_layers(small, [0, 1])) == fingerprint(want)
    half = models.cast(small, "bfloat16")
    assert half.config.dtype == "bfloat16"
    np.testing.assert_array_equal(
        half.arrays["q"].scale, small.arrays["q"].scale
    )
    # The floats of one layer are rounded once, from the product in f32.
    rounded = as_floats(half.arrays["q"], "bfloat16")
    exact = as_floats(half.arrays["q"], "float32").astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded, exact)


def test_a_file_is_quantised_as_it_is_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make(LLAMA))
    model, _ = load(path, finish=quantizer("int8"))
    floats, _ = load(path)
    assert fingerprint(model) == fingerprint(quantize(floats, "int8"))


def test_what_cannot_be_done_is_said(tmp_path):
    small = quantize(make(LLAMA), "int8")
    with pytest.raises(ValueError, match="cannot export a quantized model"):
        models.save_model(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot quantize a quantized"):
        quantize(small, "int4")
    with pytest.raises(ValueError, match="'int3' must be int8, int4 or ''"):
        quantizer("int3")
    assert quantizer("") is None
