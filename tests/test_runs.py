"""A run of ours as the source of another one's student or teacher."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_files import (
    LLAMA,
    QWEN,
    assert_same,
    logits_of,
    make,
    save_run,
)
from small_run import settings_with

from topd_jax.data.tokenizers import SentencePieceTokenizer, wrap_tokenizer
from topd_jax.models import DecoderConfig, RopeScaling, load
from topd_jax.models.io.runs import is_run
from topd_jax.training.setup import load_setup

KEY = jax.random.key(0)


def test_a_config_comes_back_from_json():
    config = QWEN.replace(
        rope_scaling=RopeScaling("yarn", 4.0, 8192.0, truncate=False),
        window=3,
        sliding=(True, False, True),
    )
    fields = json.loads(json.dumps(config.to_dict()))
    del fields["post_norms"]  # as older runs have it
    assert DecoderConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="unknown fields of a decoder: heat"):
        DecoderConfig.from_dict(fields | {"heat": 1})


def files(directory):
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*")}


def test_a_student_is_read_alone(tmp_path, asked):
    run = save_run(tmp_path / "run", make(QWEN))
    save_run(run, make(QWEN, 1), step=5)
    save_run(run, make(QWEN, 2), step=4, folder="best")
    before = files(run)
    for source, seed in (("", 1), ("best", 2), ("checkpoints/3", 0)):
        assert is_run(run / source)
        model, tokenizer = load(run / source)
        assert tokenizer is None
        assert_same(model, make(QWEN, seed))
        # Not the state of the optimizer.
        assert len(set(asked)) == len(asked) == len(model.arrays)
        assert all(name.startswith("train.student") for name in asked)
        asked.clear()
    assert files(run) == before, "a run is not touched by who reads it"
    seen = []
    options = dict(
        dtype="bfloat16", param_dtype="bfloat16", remat="full", unroll=3
    )
    model, _ = load(
        run, finish=lambda name, x: seen.append(name) or x, **options
    )
    assert seen == list(make(QWEN).arrays)
    assert model.config == dataclasses.replace(QWEN, **options)
    for name, array in make(QWEN, 1).arrays.items():
        np.testing.assert_array_equal(
            model.arrays[name], array.astype(jnp.bfloat16)
        )


def test_what_is_not_there_is_said_with_what_is(tmp_path):
    run = save_run(tmp_path / "run", make(LLAMA))
    save_run(run, make(LLAMA), step=6)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "settings.json").write_text("{}")
    old = save_run(tmp_path / "old", make(LLAMA), record={"data": {}})
    wider = dataclasses.replace(LLAMA, mlp_width=72, tied=False).to_dict()
    part = save_run(tmp_path / "part", make(LLAMA), record={"student": wider})
    there = r"no checkpoint at .*run/{}: there is .*run/checkpoints .steps 3, 6"
    for source, message in (
        (run / "best", there.format("best")),
        (run / "checkpoints" / "4", there.format("checkpoints/4")),
        (begun, "no checkpoint at .*: train first"),
        (old, "old/checkpoints/3 is no decoder of this"),
        (part, "only a part of its student.*: no gate, up, down, output of"),
    ):
        with pytest.raises(ValueError, match=message):
            load(source)
    assert not is_run(tmp_path)
    assert not is_run("owner/name")


def test_a_distilled_student_starts_and_teaches_the_next_run(trained, tmp_path):
    found, tokenizer = load(trained)
    tokenizer = wrap_tokenizer(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (trained / "tokenizer" / "chat_template.jinja").exists()
    settings = settings_with(
        student__source=str(trained), teacher__source=str(trained / "best")
    )
    setup = load_setup(settings, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is made from scratch"
    assert setup.tokenizer.vocabulary() == tokenizer.vocabulary()
    tokens = jax.random.randint(KEY, (2, 9), 4, found.config.vocab_size)
    best, _ = load(trained / "best")
    for got, want in (
        (setup.student, found), (setup.teachers[0].model, best)
    ):  # fmt: skip
        np.testing.assert_array_equal(
            logits_of(got, tokens), logits_of(want, tokens)
        )
