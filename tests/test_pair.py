"""What a run is made of: what must fit together, and what a kill leaves."""

import dataclasses
import errno
import json
import re
import types

import numpy as np
import pytest
import small_hub
from small_files import LLAMA, edit_config, make, save_run, write_gguf
from small_run import settings_with

from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.data.toy_world import models
from topd_jax.models import (
    describe,
    end_ids,
    fingerprint,
    load,
    save_model,
)
from topd_jax.training.setup import load_pair


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A random model of 50 ids with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return str(write_gguf(path, make(LLAMA)))


def questions(path, count, answer="4 + 4 = 8\n#### 8"):
    """A file as GSM8K is published."""
    rows = [
        {"question": f"what is {i}", "answer": answer} for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_the_world_gives_a_pair_that_fits(world_cache, tmp_path):
    settings = settings_with(world_cache)
    pair = load_pair(settings, tmp_path)
    assert pair.student.config.vocab_size == pair.teacher.config.vocab_size
    assert pair.teacher_fingerprint == fingerprint(pair.teacher)
    assert len(pair.encoded.records) == settings.world.prompts
    assert len(pair.validation.records) == settings.eval.problems
    batch = next(pair.stream(settings))
    placed = pair.place(batch.prompts)
    np.testing.assert_array_equal(placed.tokens, batch.prompts.tokens)
    assert list(tmp_path.iterdir()) == []  # the cache is elsewhere


def test_the_split_of_the_interval_is_the_configs(world_cache, tmp_path):
    pair = load_pair(settings_with(world_cache, eval__split="test"), tmp_path)
    assert pair.validation.records == pair.test.records
    other = load_pair(settings_with(world_cache), tmp_path)
    assert other.validation.records != other.test.records


def test_a_file_of_questions_is_split(world_cache, gguf, tmp_path):
    path = questions(tmp_path / "gsm8k.jsonl", 10)
    settings = settings_with(
        student__source=gguf, teacher__source=gguf, student__keep_layers=(0, 2),
        data__source="jsonl", data__path=path, data__held_out=3,
    )  # fmt: skip
    pair = load_pair(settings, tmp_path)
    held = [r["prompt"] for r in pair.test.records]
    assert held == ["what is 0", "what is 1", "what is 2"]
    assert pair.validation.records == pair.test.records
    assert len(pair.encoded.records) == 7
    assert not {r["prompt"] for r in pair.encoded.records} & set(held)
    assert pair.student.config.layers == 2
    assert pair.teacher.config.layers == 3
    assert pair.hub_tokenizer is not None
    other = questions(tmp_path / "test.jsonl", 4, "")
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, eval_path=other)
    )
    pair = load_pair(settings, tmp_path)
    assert len(pair.encoded.records) == 10
    assert len(pair.test.records) == 4
    assert pair.grade(pair.test.records, ["8"] * 4) is None


def untouched(tmp_path):
    """Nothing was trained before the refusal."""
    return not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh__fsdp": 3},
            "fsdp=3 x tensor=1 x expert=1 x sequence=1 needs 3 devices",
        ),
        (
            {"data__source": "jsonl"},
            "data.path is empty; .* needs it: --config.data.path=FILE",
        ),
        (
            {"data__source": "jsonl", "data__path": "no/such.jsonl"},
            "no file at no/such.jsonl; give data.path the path of a JSONL",
        ),
    ],
)  # fmt: skip
def test_cheap_refusals_come_before_any_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_pair(settings_with(**changes), tmp_path)
    assert untouched(tmp_path)


@pytest.mark.parametrize("section", ["data", "eval"])
def test_a_batch_must_divide_over_the_mesh(tmp_path, monkeypatch, section):
    shape = {"data": 2, "fsdp": 2, "tensor": 1, "expert": 2}
    mesh = types.SimpleNamespace(shape=shape)
    monkeypatch.setattr(
        "topd_jax.training.setup.sharding.make_mesh", lambda **_: mesh
    )
    settings = settings_with(**{f"{section}__batch_size": 12})
    with pytest.raises(
        ValueError,
        match=rf"{section}\.batch_size=12 must be divisible by the mesh's "
        r"data x fsdp x expert \(8\); try 16",
    ):
        load_pair(settings, tmp_path)
    assert untouched(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n{"question": \n', "questions.jsonl line 2 is not"),
        ('{"question": "a"}\n\n{"q": "b"}\n',
         "questions.jsonl line 3 has no text in the field \"question\"; its "
         "fields are ['q']; set data.prompt_field"),
        ('{"question": "a"}\n[1]\n', "line 2 is JSON but not an object"),
        ("\n", "questions.jsonl holds no records"),
        ('{"question": "a"}\n', "held_out=64 must be below the 1 prompts of"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_file(tmp_path, text, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    settings = settings_with(data__source="jsonl", data__path=str(path))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pair(settings, tmp_path)
    assert untouched(tmp_path)


def test_a_prompt_longer_than_its_limit_is_named(world_cache, tmp_path):
    settings = settings_with(world_cache, data__max_prompt_length=5)
    with pytest.raises(
        ValueError,
        match=r"prompt \d+ \(tiny world train problem \d+\) has \d+ tokens; "
        r"the limit is 5: raise data\.max_prompt_length",
    ):
        load_pair(settings, tmp_path)


def test_differing_vocabularies_are_refused(world_cache, gguf, tmp_path):
    settings = settings_with(world_cache, student__source=gguf)
    with pytest.raises(
        ValueError,
        match=r"student and teacher have different vocabularies \(50 and 64 "
        r"ids\): .* choose a pair that shares one tokenizer",
    ):
        load_pair(settings, tmp_path)


def test_a_tokenizer_that_the_model_is_too_small_for(world_cache, tmp_path):
    save_model(make(LLAMA), tmp_path / "bare")  # 50 rows, no tokenizer
    settings = settings_with(
        world_cache, student__source=str(tmp_path / "bare")
    )
    with pytest.raises(
        ValueError, match=r"tokenizer has 64 ids .*vocab_size=50 is smaller"
    ):
        load_pair(settings, tmp_path)


def test_a_pair_without_any_tokenizer_is_refused(tmp_path):
    bare = str(save_model(make(LLAMA), tmp_path / "bare"))
    settings = settings_with(
        student__source=bare, teacher__source=bare, data__source="jsonl",
        data__path=questions(tmp_path / "q.jsonl", 70),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"neither .* has a tokenizer"):
        load_pair(settings, tmp_path)


@pytest.mark.parametrize("source", ["no/such/model", "no/such/model.gguf"])
def test_a_model_that_is_not_there_is_named(world_cache, tmp_path, source):
    settings = settings_with(world_cache, student__source=source)
    with pytest.raises((ValueError, OSError), match=re.escape(source)):
        load_pair(settings, tmp_path)


def test_a_run_stops_at_the_ends_that_either_model_names(tmp_path):
    """generation_config.json counts, not only the tokenizer's own end."""
    one = small_hub.hub_directory(tmp_path / "one", ends=[2, 1])
    two = small_hub.hub_directory(tmp_path / "two", ends=0)
    pair = load_pair(small_hub.settings(tmp_path, one, two), tmp_path)
    assert pair.tokenizer.eos_ids == (2, 1, 0)
    more = small_hub.settings(tmp_path, one, one, data__end_ids=(7,))
    assert load_pair(more, tmp_path).tokenizer.eos_ids == (2, 1, 7)


def test_config_json_names_the_ends_where_no_other_file_does(tmp_path):
    one = small_hub.hub_directory(tmp_path / "one")
    edit_config(one, eos_token_id=[1, 2])
    assert end_ids(one) == (1, 2)
    pair = load_pair(small_hub.settings(tmp_path, one, one), tmp_path)
    assert pair.tokenizer.eos_ids == (1, 2)
    (tmp_path / "one" / "generation_config.json").write_text("{}")
    assert end_ids(one) == ()  # as in transformers


def test_a_gguf_names_the_end_of_a_turn_beside_that_of_a_text(tmp_path):
    file = write_gguf(
        tmp_path / "m.gguf", make(LLAMA),
        metadata={"tokenizer.ggml.eot_token_id": 5},
    )  # fmt: skip
    assert end_ids(file) == (0, 5)


def test_thinking_is_told_to_the_chat_template(tmp_path):
    source = small_hub.hub_directory(
        tmp_path / "one", template=small_hub.THINKING
    )
    lengths = []
    for thinking in (None, True, False):
        settings = small_hub.settings(
            tmp_path, source, source, data__thinking=thinking
        )
        pair = load_pair(settings, tmp_path)
        lengths.append(len(pair.encoded.ids[0]))
    assert lengths[0] == lengths[1] == lengths[2] - len("<think></think>")


def test_a_description_agrees_with_what_is_loaded(tmp_path, gguf):
    for source in (gguf, small_hub.hub_directory(tmp_path / "one", ends=2)):
        described = describe(source, dtype="bfloat16")
        model, tokenizer = load(source, dtype="bfloat16")
        assert described.config == model.config
        assert described.tokenizer.get_vocab() == tokenizer.get_vocab()
    run = save_run(tmp_path / "run", make(LLAMA))
    assert describe(run, unroll=3).config == load(run, unroll=3)[0].config
    assert describe(run).tokenizer is None
    assert end_ids(run) == ()


class Killed(BaseException):
    """What stops a test where a signal would."""


@pytest.fixture
def untrained(monkeypatch):
    """World models without their training; counts what would be trained."""
    trained = []

    def fit(model, batch, *, steps, learning_rate, name):
        batch(0)
        trained.append(name.split()[0])
        return model

    monkeypatch.setattr(models, "fit", fit)
    return trained


def make_world(cache):
    return models.world_models(settings_with().world, cache)


def assert_same_world(made, reference):
    for ours, theirs in zip(made[:2], reference[:2], strict=True):
        assert fingerprint(load(ours)[0]) == fingerprint(load(theirs)[0])
    assert made[2].model == reference[2].model


def test_a_world_that_was_killed_half_made_is_finished(
    tmp_path, untrained, monkeypatch
):
    reference = make_world(tmp_path / "whole")
    plain = models.fit

    def deadly(*args, name, **options):
        if name.startswith("student"):
            raise Killed
        return plain(*args, name=name, **options)

    monkeypatch.setattr(models, "fit", deadly)
    with pytest.raises(Killed):
        make_world(tmp_path / "half")
    untrained.clear()
    monkeypatch.setattr(models, "fit", plain)
    assert_same_world(make_world(tmp_path / "half"), reference)
    assert untrained == ["student"]  # the teacher was there already
    make_world(tmp_path / "half")
    assert untrained == ["student"]  # and now both are


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_world_that_was_killed_while_writing_is_made_again(
    tmp_path, untrained, monkeypatch, part
):
    reference = make_world(tmp_path / "whole")

    def half_tokenizer(self, path):
        path.write_bytes(self.model[: len(self.model) // 2])
        raise Killed

    def half_model(model, directory, **_):
        staging = directory.parent / f".{directory.name}.partial"
        staging.mkdir()
        (staging / "config.json").write_text("{")
        raise Killed

    with monkeypatch.context() as patch:
        if part == "tokenizer":
            patch.setattr(SentencePieceTokenizer, "save", half_tokenizer)
        else:
            patch.setattr(models, "save_model", half_model)
        with pytest.raises(Killed):
            make_world(tmp_path / "half")
    assert_same_world(make_world(tmp_path / "half"), reference)


def test_a_torn_tokenizer_beside_finished_models_is_replaced(
    tmp_path, untrained, monkeypatch
):
    """Other sizes share the models: the tokenizer alone is written then."""
    make_world(tmp_path)
    (file,) = tmp_path.glob("tokenizer-*.model")
    whole = file.read_bytes()
    file.unlink()

    def full(self, path):
        path.write_bytes(self.model[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SentencePieceTokenizer, "save", full)
        with pytest.raises(OSError, match="No space left"):
            make_world(tmp_path)
    untrained.clear()
    assert make_world(tmp_path)[2].model == whole
    assert untrained == []


def test_other_settings_never_meet_a_cached_model(tmp_path, untrained):
    make_world(tmp_path)
    untrained.clear()
    options = settings_with().world
    longer = dataclasses.replace(options, student_steps=4, prompts=65)
    models.world_models(longer, tmp_path)
    assert untrained == ["student"]
    untrained.clear()
    wilder = dataclasses.replace(options, student_left_to_right=0.5)
    models.world_models(wilder, tmp_path)
    assert untrained == ["teacher", "student"]  # the tokenizer is of both
