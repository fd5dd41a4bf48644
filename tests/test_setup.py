"""What a run is made of: what must fit together, and what a kill leaves."""

import dataclasses
import errno
import json
import pathlib
import re
import shutil
import types

import pytest
import small_hub
from foreign_model import make_foreign
from small_files import LLAMA, edit_config, make, save_run, write_gguf
from small_run import changed, settings_with

from topd_jax.data.settings import WorldSettings
from topd_jax.data.tokenizers import HuggingFaceTokenizer
from topd_jax.data.toy_world import models
from topd_jax.models import (
    RopeScaling,
    describe,
    fingerprint,
    load,
    save_model,
)
from topd_jax.training.setup import load_setup, with_models
from topd_jax.training.shapes import model_configs
from topd_jax.types import Teacher


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
    settings = settings_with(world_cache, data__max_prompt_length=20)
    setup = load_setup(settings, tmp_path)
    (teacher,) = setup.teachers
    assert setup.vocab_size == teacher.model.config.vocab_size == 64
    assert setup.teacher_fingerprints == {"": fingerprint(teacher.model)}
    assert len(setup.encoded.records) == settings.world.prompts
    assert len(setup.validation.records) == settings.eval.problems
    assert setup.validation.records != setup.test.records
    # Every batch has one width: one program serves all.
    stream = setup.stream(settings)
    assert {next(stream).prompts.tokens.shape for _ in range(4)} == {(8, 20)}
    assert list(tmp_path.iterdir()) == []  # the cache is elsewhere


def test_a_file_of_questions_is_split(gguf, tmp_path):
    settings = settings_with(
        student__source=gguf, teacher__source=gguf, student__keep_layers=(0, 2),
        data__source="jsonl", data__held_out=3,
        data__path=questions(tmp_path / "gsm8k.jsonl", 10),
    )  # fmt: skip
    setup = load_setup(settings, tmp_path)
    held = [r["prompt"] for r in setup.test.records]
    assert held == ["what is 0", "what is 1", "what is 2"]
    assert setup.validation.records == setup.test.records
    assert len(setup.encoded.records) == 7
    assert not {r["prompt"] for r in setup.encoded.records} & set(held)
    assert setup.student.config.layers == 2
    assert setup.teachers[0].model.config.layers == 3
    assert isinstance(setup.tokenizer, HuggingFaceTokenizer)
    other = questions(tmp_path / "test.jsonl", 4, "")
    setup = load_setup(changed(settings, "data", eval_path=other), tmp_path)
    held = {r["prompt"] for r in setup.test.records}
    assert (len(setup.encoded.records), len(held)) == (6, 4)
    assert not {r["prompt"] for r in setup.encoded.records} & held
    assert setup.grade(setup.test.records, ["8"] * 4) is None


def test_cheap_refusals_come_before_any_training(tmp_path, monkeypatch):
    def refuse(message, **changes):
        with pytest.raises(ValueError, match=message):
            load_setup(settings_with(**changes), tmp_path)
        assert list(tmp_path.iterdir()) == []

    refuse("fsdp=3 .* devices", mesh__fsdp=3)
    refuse(
        "data.path is empty; .* needs it: --config.data.path=FILE",
        data__source="jsonl",
    )
    shape = {"data": 2, "fsdp": 2, "tensor": 1, "expert": 2}
    monkeypatch.setattr(
        "topd_jax.training.setup.sharding.make_mesh",
        lambda **_: types.SimpleNamespace(shape=shape),
    )
    for section in ("data", "eval"):
        refuse(
            rf"{section}\.batch_size=12 .*\(8\); try 16",
            **{f"{section}__batch_size": 12},
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__max_prompt_length": 5},
         r"prompt \d+ \(tiny world train problem \d+\) has \d+ tokens; the "
         r"limit is 5: raise data\.max_prompt_length"),
        ({"student__source": "no/such/model"}, "no/such/model"),
        ({"student__source": "no/such/model.gguf"}, "no/such/model.gguf"),
        ({"student__source": "GGUF"},
         r"different vocabularies \(50 and 64 ids\): .* shares one tokenizer"),
        ({"student__source": "BARE"},
         r"tokenizer has 64 ids .*vocab_size=50 is smaller"),
        ({"student__source": "BARE", "teacher__source": "BARE"},
         "no tokenizer in .*student.source"),
        ({"student__source": "GGUF", "teacher__source": "GGUF",
          "data__end_ids": (50,)}, r"end_ids=\(50,\) must be below 50, the id"),
    ],
)  # fmt: skip
def test_models_and_tokenizers_that_do_not_fit_are_refused(
    world_cache, gguf, tmp_path, changes, message
):
    if "BARE" in changes.values():
        save_model(make(LLAMA), tmp_path / "BARE")  # 50 rows, no tokenizer
    known = {"GGUF": gguf, "BARE": str(tmp_path / "BARE")}
    changes = {
        k: known.get(v, v) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        load_setup(settings_with(world_cache, **changes), tmp_path)


def test_any_model_takes_a_models_place_if_it_fits(world_cache, tmp_path):
    setup = load_setup(settings_with(world_cache), tmp_path)
    with pytest.raises(ValueError, match="vocab_size=40 is smaller"):
        with_models(setup, student=make_foreign())
    (only,) = setup.teachers
    assert with_models(setup).student is setup.student
    other = with_models(setup, teacher=setup.student)
    assert other.teacher_fingerprints == {"": fingerprint(setup.student)}
    several = Teacher(only.model, "a"), Teacher(only.model, "b")
    with pytest.raises(ValueError, match="takes the place of 2 teachers"):
        with_models(
            dataclasses.replace(setup, teachers=several), teacher=only.model
        )


def test_a_run_stops_at_the_ends_that_any_file_names(tmp_path):
    """generation_config.json counts, not only the tokenizer's own end."""
    one = small_hub.hub_directory(tmp_path / "one", ends=[2, 1])
    two = small_hub.hub_directory(tmp_path / "two", ends=0)
    plain = small_hub.hub_directory(tmp_path / "plain")
    edit_config(plain, eos_token_id=[1, 2])
    for pair, more, ends in (
        ((one, two), (), (2, 1, 0)),
        ((one, one), (7,), (2, 1, 7)),
        ((plain, plain), (), (1, 2)),  # config.json, where no other file does
    ):
        settings = small_hub.settings(tmp_path, *pair, data__end_ids=more)
        assert load_setup(settings, tmp_path).tokenizer.eos_ids == ends
    (tmp_path / "plain" / "generation_config.json").write_text("{}")
    assert describe(plain).end_ids == ()  # as in transformers
    end_of_turn = {"tokenizer.ggml.eot_token_id": 5}
    file = write_gguf(tmp_path / "m.gguf", make(LLAMA), metadata=end_of_turn)
    assert describe(file).end_ids == (0, 5)


def test_longrope_is_chosen_by_the_longest_row_of_the_run(tmp_path):
    """120 tokens of prompt and 16 of completion; the same in a plan."""
    pair = []
    for length in (136.0, 135.0):
        scaling = RopeScaling(
            "longrope", 4.0, length,
            short_factors=(1.0,) * 4, long_factors=(1.0, 2.0, 3.0, 4.0),
        )  # fmt: skip
        config = small_hub.CONFIG.replace(rope_scaling=scaling)
        path = tmp_path / str(length)
        pair.append(small_hub.hub_directory(path, model=make(config)))
    settings = small_hub.settings(tmp_path, *pair)
    setup = load_setup(settings, tmp_path)
    chosen = {"student": False, "teacher": True}
    assert setup.student.config.long_rope is chosen["student"]
    assert setup.teachers[0].model.config.long_rope is chosen["teacher"]
    configs = model_configs(settings)
    assert {name: c.long_rope for name, c in configs.items()} == chosen


def test_thinking_is_an_option_of_the_chat_template(tmp_path):
    without = "{% if enable_thinking is false %}<think></think>{% endif %}"
    template = small_hub.TEMPLATE + without
    source = small_hub.hub_directory(tmp_path / "one", template=template)
    lengths = []
    for thinking in (None, True, False):
        settings = small_hub.settings(
            tmp_path, source, source, data__thinking=thinking
        )
        lengths.append(len(load_setup(settings, tmp_path).encoded.ids[0]))
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
    assert describe(run).end_ids == ()


# --- the tiny world's models, killed while they are made -------------------


class Killed(BaseException):
    """What stops a test where a signal would."""


@pytest.fixture
def untrained(monkeypatch):
    """World models without their training; lists what would be trained."""
    trained = []

    def fit(model, batch, *, name, **options):
        batch(0)
        trained.append(name.split()[0])
        return model

    monkeypatch.setattr(models, "fit", fit)
    return trained


def make_world(cache, **changes):
    settings = dataclasses.replace(settings_with().world, **changes)
    return models.world_models(settings, cache)


def test_a_world_that_was_killed_half_made_is_finished(
    tmp_path, untrained, monkeypatch
):
    reference, plain = make_world(tmp_path / "whole"), models.save_model

    def save_half(model, directory, **options):
        if directory.name.startswith("teacher"):
            return plain(model, directory, **options)
        staging = directory.parent / f".{directory.name}.partial"
        staging.mkdir()
        (staging / "config.json").write_text("{")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_model", save_half)
        with pytest.raises(Killed):
            make_world(tmp_path / "half")
    untrained.clear()
    *half, tokenizer = make_world(tmp_path / "half")
    for path, whole in zip(half, reference, strict=False):
        assert fingerprint(load(path)[0]) == fingerprint(load(whole)[0])
    assert tokenizer.model == reference[2].model
    # What was whole already is not made again.
    assert untrained == ["student"]


def test_a_world_is_whole_where_its_last_file_is(tmp_path, monkeypatch):
    """An upload broke off within a student whose teacher is the package's."""
    settings, made = WorldSettings(student_steps=7), []
    _, student, tokenizer = models._names(settings)
    (tmp_path / student).mkdir()
    shutil.copy(models.TRAINED / tokenizer, tmp_path)  # another world's

    def make(_, folder):
        made.append(folder)
        (folder / student / "model.safetensors").touch()

    monkeypatch.setattr(models, "_make", make)
    for _ in range(2):
        assert models.world_models(settings, tmp_path)[1].parent == tmp_path
    assert made == [tmp_path]


def test_a_torn_tokenizer_beside_finished_models_is_replaced(
    tmp_path, untrained, monkeypatch
):
    """Other sizes share the models: the tokenizer alone is written then."""
    make_world(tmp_path)
    (file,) = tmp_path.glob("tokenizer-*.model")
    whole = file.read_bytes()
    file.unlink()

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            make_world(tmp_path)
    untrained.clear()
    assert make_world(tmp_path)[2].model == whole
    assert untrained == []
    # Other settings never meet a cached model.
    make_world(tmp_path, student_steps=4, prompts=65)
    assert untrained == ["student"]
    untrained.clear()
    make_world(tmp_path, student_left_to_right=0.5)
    assert untrained == ["student"]  # whatever its habits: one teacher
    assert not [p for p in tmp_path.iterdir() if re.match(r".*new", p.name)]
