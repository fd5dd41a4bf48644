"""Families: their configs read and written, and what is refused by name."""

import json
import math
import re

import pytest
from small_files import LLAMA, assert_same, make
from tiny_configs import config_of

from topd_jax.models import RopeScaling, load, save_model
from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.hub_config import (
    _read_names,
    config_json,
    decoder_config,
)
from topd_jax.models.io.hub_values import VALUES

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def read(model_type, **changes):
    fields = SHAPE | {"model_type": model_type} | changes
    return decoder_config(fields, where="config.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_found_and_files_come_back(name, tmp_path):
    model = make(config_of(name))
    out = save_model(model, tmp_path / "m")
    assert json.loads((out / "config.json").read_text())["model_type"] == name
    assert_same(load(out)[0], model)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_refuse_by_the_field_that_they_lose(name):
    other = "olmo2" if name != "olmo2" else "llama"
    with pytest.raises(ValueError, match=r"=.* cannot be written as"):
        config_json(config_of(name), other)


def test_windows_as_each_family_spells_them():
    assert read("mistral").sliding == (True,) * 6
    assert read("mistral").window == 4096
    assert read("mistral", sliding_window=None).sliding == ()
    on = {"use_sliding_window": True, "sliding_window": 9}
    for family in ("qwen2", "qwen3"):
        assert read(family, sliding_window=9).window is None
        got = read(family, max_window_layers=4, **on)
        assert (got.window, got.sliding) == (9, (False,) * 4 + (True,) * 2)
        kinds = ["sliding_attention", *["full_attention"] * 5]
        got = read(family, layer_types=kinds, **on)
        assert got.sliding == (True, *[False] * 5)
    assert read("qwen3_moe", **on).sliding == (True,) * 6
    assert read("gemma2").sliding == (True, False) * 3
    assert read("gemma3_text").sliding == (True,) * 5 + (False,)
    got = read("gemma3_text", sliding_window_pattern=2)
    assert got.sliding == (True, False) * 3
    got = read("smollm3", no_rope_layer_interval=3, **on)
    assert got.no_rope == got.sliding == (False, False, True) * 2


def test_rope_in_the_old_and_the_new_spelling():
    llama3 = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    want = RopeScaling("llama3", 8.0, 8192.0, 1.0, 4.0)
    old = {"rope_type": "llama3"} | llama3
    new = old | {"rope_theta": 5e5}
    for spelt in (
        {"rope_theta": 5e5, "rope_scaling": old},
        {"rope_parameters": new},
        {"rope_theta": 5e5, "rope_scaling": old, "rope_parameters": new},
    ):
        got = read("llama", **spelt)
        assert (got.rope_theta, got.rope_scaling) == (5e5, want)
    # Not 8192.0, which llama.cpp's converter does not take for a count.
    assert json.dumps(config_json(got)["rope_scaling"]) == json.dumps(old)
    yarn = {"type": "yarn", "factor": 4.0}
    got = read("qwen2", rope_scaling=yarn, max_position_embeddings=99)
    assert got.rope_scaling.original_length == 99
    # 0.1 ln 4 + 1
    assert got.rope_scaling.attention_factor == pytest.approx(1.1386294)


def test_longrope_in_the_old_and_the_new_spelling():
    lengths = {"original_max_position_embeddings": 64,
               "max_position_embeddings": 4096}  # fmt: skip
    lists = {k: v for k, v in LONGROPE.items() if k.endswith("_factor")}
    # sqrt(1 + ln 64 / ln 64)
    want = RopeScaling(
        "longrope", 64.0, 64.0, attention_factor=math.sqrt(2),
        short_factors=(1.0, 1.5, 2.0, 3.0), long_factors=(1.0, 2.0, 4.0, 8.0),
    )  # fmt: skip
    for spelt in (
        {"rope_scaling": {"type": "su"} | lists},
        {"rope_scaling": {"type": "longrope"} | lists},
        {"rope_parameters": {"rope_type": "longrope"} | lists},
    ):
        assert read("phi3", **lengths, **spelt).rope_scaling == want
    new = LONGROPE | {"rope_theta": 5e5, "factor": 2.0, "attention_factor": 3}
    got = read("llama", rope_parameters=new).rope_scaling
    assert (got.factor, got.attention_factor) == (2.0, 3.0)
    # Of what a file of phi3 says, older releases read three fields alone.
    decoder = read("phi3", **lengths, **spelt)
    fields = config_json(decoder, "phi3")
    assert fields["rope_scaling"] == {"type": "longrope"} | lists
    assert fields["partial_rotary_factor"] == 1
    # A tokenizer's limit is none of the lengths that scale attention.
    fields = config_json(decoder, "phi3", {"max_position_embeddings": 32})
    assert decoder_config(fields, where="x") == decoder


def test_local_rope_in_the_old_and_the_new_spelling():
    scaled = {"rope_type": "linear", "factor": 8.0}
    bases = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    old = bases | {"rope_scaling": scaled}
    new = {
        "full_attention": scaled | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    # As 5.15 writes it where no layer slides.
    added = new | {"rope_type": "default", "rope_theta": None}
    for spelt in (old, {"rope_parameters": new}, {"rope_parameters": added}):
        got = read("gemma3_text", **spelt)
        assert got.rope_theta == 1e6
        assert got.local_rope_theta == 1e4
        assert got.rope_scaling == RopeScaling("linear", 8.0)
    bad = new | {"sliding_attention": scaled}
    with pytest.raises(ValueError, match="rope_parameters.sliding_attention"):
        read("gemma3_text", rope_parameters=bad)


def test_the_fields_of_published_files_are_known():
    """Those that they give beside, or leave to, the reference's own."""
    got = read(
        "gpt_oss", experts_per_token=4, initial_context_length=4096,
        quantization_config={
            "quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"],
        },
    )  # fmt: skip
    assert (got.experts, got.swiglu_limit, got.sinks) == (128, 7.0, True)
    assert got.rope_scaling.truncate is False
    kinds = ["sliding_attention", "full_attention"] * 3
    got = read(
        "exaone4", sliding_window_pattern="LLLG", layer_types=kinds,
        reorder_qk_norm=True,
    )  # fmt: skip
    assert got.no_rope == (False, True) * 3 and got.window == 4096
    assert read("gemma", hidden_activation=None).activation == "gelu_tanh"
    got = read("phi3", original_max_position_embeddings=16384, auto_map={})
    assert got.rotary_dim is None
    assert read("glm4").rotary_dim == 4
    assert read("qwen2_moe", sliding_window=0).window is None
    # Qwen2.5 and what was distilled into it, Phi-4-mini, Gemma 2 of 9B,
    # Qwen3-Coder of 30B.
    assert read("qwen2", use_mrope=False) == read("qwen2")
    few = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    assert read("phi3", **few) == read("phi3")
    assert read("gemma2", sliding_window_size=4096) == read("gemma2")
    few = {"shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert read("qwen3_moe", qkv_bias=False, **few) == read("qwen3_moe")
    with pytest.raises(ValueError, match="use_mrope=True is not supported"):
        read("qwen2", use_mrope=True)


def test_the_text_of_a_larger_model_has_its_defaults_and_ties():
    text = {k: SHAPE[k] for k in ("hidden_size", "num_hidden_layers")}
    text |= {"intermediate_size": 64, "sliding_window": 9}
    got = read("gemma3", text_config=text, vision_config={"hidden_size": 3})
    assert (got.vocab_size, got.heads, got.head_dim) == (262_208, 8, 256)
    assert got.tied and got.window == 9
    text |= {"vocab_size": 9, "num_attention_heads": 8}
    for tied in (False, True):
        given = {"text_config": text, "tie_word_embeddings": tied}
        assert read("mistral3", **given).tied is tied
    assert not read("mistral3", text_config=text).tied


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = YARN | {
    "rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.5, 2.0, 3], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip

# (family, what is named, value of the field that is named) or (family, what
# is named, fields).
REFUSED = [
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma2", "hidden_act", "silu"),
    ("mistral", "sliding_window", 0),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention"] * 6),
    ("qwen2", "sliding_window=None",
     {"layer_types": ["sliding_attention"] * 6}),
    ("qwen2", "layer_types", ["chunked_attention"] * 6),
    ("qwen3_moe", "experts_per_token=129", {"num_experts_per_tok": 129}),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "mlp_only_layers", [3]),
    ("smollm3", "must have one entry a layer, 6", {"no_rope_layers": []}),
    ("gemma2", "entry a layer, 6", {"layer_types": ["full_attention"]}),
    ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    ("llama", "rope_parameters", {"rope_type": "linear"}),
    ("llama", "rope_parameters", {"full_attention": {"rope_theta": 1.0}}),
    ("llama", "'factor'", {"rope_scaling": {"type": "default", "factor": 2}}),
    *(("gemma3_text", "the reference ignores", {"rope_parameters": given})
      for given in (LINEAR, {"full_attention": LINEAR, "truncate": False})),
    # transformers 5.4 does not read this scaling at all
    ("gemma3_text",
     "the reference ignores full_attention.truncate|transformers refuses",
     {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}),
    ("gemma3_text", "mean nothing here",
     {"rope_scaling": {"full_attention": LINEAR}}),
    ("llama", "low_freq_factor=4 must be below high_freq_factor=4",
     {"rope_scaling": LLAMA3}),
    ("llama", "'short_factor'", {"rope_scaling": YARN | {"short_factor": [1]}}),
    ("phi3", "short_mscale", {"rope_scaling": LONGROPE | {"short_mscale": 1}}),
    ("llama", "rotary_dim=8 turns 4 pairs, .* are for 3 and 4",
     {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 3}}),
    ("glm4", "partial_rotary_factor", 1.5),
    ("glm4", "rotary_dim=3 must be even", {"partial_rotary_factor": 0.45}),
    ("glm4", "rotary_dim=0 must be even", {"partial_rotary_factor": 0.01}),
    ("llama", "partial_rotary_factor",
     {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("mistral", "llama_4_scaling_beta",
     {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}),
    ("ministral3", "mscale", {"rope_parameters": YARN | {"mscale": "1"}}),
    ("gpt_oss", "quantization_config",
     {"quantization_config": {"quant_method": "fp8"}}),
    ("olmoe", "clip_qkv", 8.0),
    ("exaone4", "sliding_window_pattern", "LLLG"),
    ("gemma3", "text_config=3 must be an object", {"text_config": 3}),
    ("mistral3", "text_config", {}),
    ("llama", "hidden_act", "relu"),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "quantization_config", {"quantization_config": {"bits": 8}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "field", "value"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(family, field, value):
    named = "rope" in field or not isinstance(value, dict)
    with pytest.raises(ValueError, match=field):
        read(family, **({field: value} if named else value))


NAN, INFINITY = math.nan, math.inf
# One field of every kind.
KINDS = [
    ("rms_norm_eps", "a positive number",
     (None, NAN, INFINITY, -1, 0.0, "1e-5", True, [1], 10**400)),
    ("tie_word_embeddings", "true or false", ("false", 1, None)),
    ("num_hidden_layers", "an integer from 1 to 1000", (1001, 6.0, 0, "4")),
    ("vocab_size", "an integer from 1 to 2147483647", (2**31, True)),
    ("num_key_value_heads", "an integer from 1", (0, "x", 1.5)),
    ("hidden_act", "a name", (["silu"], None, {}, 3)),
    ("rope_theta", "a number above 1", (None, "x", True, 1, 10**400, NAN)),
    ("rope_scaling", "an object, of objects",
     ("", ["linear"], 3, {"full_attention": 3}, {"sliding_attention": []})),
]  # fmt: skip
OF_A_FAMILY = [
    ("gemma3_text", "rope_local_base_freq", "a number above 1", 1),
    ("gemma3_text", "sliding_window_pattern", "an integer from 1", 0),
    ("gemma3_text", "layer_types", "a list of names, one a layer", [3] * 6),
    ("gemma2", "sliding_window", "an integer from 0", -3),
    ("smollm3", "no_rope_layers", "a list of 0 or 1, one a layer", [2] * 6),
]


@pytest.mark.parametrize(
    ("family", "field", "bound", "value"),
    [("llama", *row[:2], value) for row in KINDS for value in row[2]]
    + OF_A_FAMILY,
)
def test_values_of_a_config_have_kinds_and_bounds(family, field, bound, value):
    line = f"{field}={value!r:.60} must be {bound}"
    with pytest.raises(ValueError, match=re.escape(line)):
        read(family, **{field: value})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_that_is_read_has_a_kind(name):
    bases = {"rope_theta", "rope_local_base_freq"}  # of rope_parameters
    assert _read_names(FAMILIES[name]) - bases <= VALUES.keys()


@pytest.mark.parametrize(
    ("start", "name", "value", "line"),
    [
        (YARN, "factor", "4", ".factor='4' must be a positive number"),
        (YARN, "truncate", "false", "'false' must be true or false"),
        (YARN, "rope_type", ["yarn"], "rope_type"),
        (LONGROPE, "original_max_position_embeddings", 1, "=1 must be a number "
         "above 1"),
        *((LONGROPE, "long_factor", given, f".long_factor={given!r:.60} must "
           "be a list of positive") for given in (2.0, [1, 2, 3, 0])),
    ],
)  # fmt: skip
def test_values_of_a_scaling_have_kinds_and_bounds(start, name, value, line):
    given = start | {"rope_theta": 1e4, name: value}
    with pytest.raises(ValueError, match=re.escape(line)):
        read("llama", rope_parameters=given)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("sliding", (True,), "sliding has 1 entries and must have one a layer"),
        ("sliding", (True,) * 3, "window=None must be positive"),
        ("experts", 4, r"experts_per_token=0 must lie in 1\.\.4"),
        ("activation", "relu", "activation='relu' must be"),
        ("heads", 5, "heads=5 must be divisible by kv_heads=2"),
        ("head_dim", 7, "rotary_dim=7 must be even"),
        ("param_dtype", "f32", "param_dtype='f32' must be"),
    ],
)
def test_bad_options_are_refused(field, value, match):
    with pytest.raises(ValueError, match=match):
        LLAMA.replace(**{field: value})
    with pytest.raises(ValueError, match="kind='dynamic' must be 'linear'"):
        RopeScaling("dynamic", 2.0)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="cannot be read") as error:
        read("llama", attention_dropout=1, frobnicate=3, vocab_size=None)
    for text in ("attention_dropout=1", "frobnicate=3", "vocab_size=None"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"'gpt2'.*supported: .*llama"):
        read("gpt2")


def test_defaults_are_the_familys_and_harmless_fields_pass():
    got = read("llama", num_key_value_heads=None, head_dim=None)
    assert (got.kv_heads, got.head_dim, got.tied) == (4, 8, False)
    assert (got.norm_eps, got.rope_theta) == (1e-6, 10_000)
    assert read("qwen2_moe", num_key_value_heads=None).kv_heads == 4
    got = read("qwen3_moe", num_local_experts=16)
    assert (got.experts, got.experts_per_token) == (16, 8)
    assert (read("qwen3_moe").experts, got.expert_width) == (128, 768)
    fields = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    fields |= {"model_type": "qwen3", "num_attention_heads": 64}
    got = decoder_config(fields, where="x")
    assert (got.head_dim, got.qk_norm) == (128, True)
    harmless = {
        "transformers_version": "5.0", "attention_dropout": 0.0,
        "sliding_window": 4096, "use_sliding_window": False,
        "eos_token_id": [1, 2], "rope_scaling": {"type": "default"},
    }  # fmt: skip
    assert read("llama", **harmless) == read("llama")
