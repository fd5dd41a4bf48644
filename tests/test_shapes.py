"""Shapes of models that are not here."""

import json

import jax
import pytest

from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.models.io.hub_config import config_json
from topd_jax.models.io.shapes import PUBLISHED, parameters_read, shape_of


def parameters(config):
    shapes = jax.eval_shape(lambda: init_decoder(config, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "total", "read"),
    [  # as the model cards say: in all, and activated or not the embedding
        ("Qwen/Qwen3-1.7B", 1.72e9, 1.72e9),
        ("Qwen/Qwen3-4B-Instruct-2507", 4.02e9, 4.02e9),
        ("Qwen/Qwen3-8B", 8.19e9, 7.57e9),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.53e9, 3.04e9),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(
    name, total, read
):
    config = shape_of(name, dtype="bfloat16")
    assert parameters(config) == pytest.approx(total, rel=2e-3)
    assert parameters_read(config) == pytest.approx(read, rel=2e-3)
    assert config.dtype == "bfloat16"


def test_what_distinguishes_the_pair_of_the_paper():
    student = shape_of("Qwen/Qwen3-4B-Instruct-2507")
    teacher = shape_of("Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert (student.rope_theta, teacher.rope_theta) == (5e6, 1e7)
    assert (student.tied, teacher.tied) == (True, False)
    assert student.qk_norm and teacher.qk_norm
    assert teacher.renormalise and teacher.experts == 128
    assert student.vocab_size == teacher.vocab_size == 151936
    assert set(PUBLISHED) >= {"Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B"}


def test_a_directory_needs_no_weights(tmp_path):
    config = DecoderConfig(
        vocab_size=40, layers=2, width=16, heads=4, kv_heads=2, head_dim=8,
        mlp_width=32,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert shape_of(str(tmp_path), remat="full").remat == "full"
    assert shape_of(str(tmp_path)).width == 16


def test_an_unknown_model_is_refused_with_the_ways_out(tmp_path):
    with pytest.raises(ValueError, match="config.json.*Qwen3-8B"):
        shape_of(str(tmp_path))
    with pytest.raises(ValueError, match="no shape for"):
        shape_of("nobody/has-this-model")
