"""Settings: the defaults agree, and what is wrong is named."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
from small_run import small_config

from topd_jax import configs
from topd_jax.configs import default
from topd_jax.objectives.objective import Objective
from topd_jax.training.config import (
    DEFAULTS,
    NO_IDENTITY,
    Settings,
    settings_from,
)

SHIPPED = sorted(
    p.stem
    for p in Path(configs.__file__).parent.glob("*.py")
    if p.stem != "__init__"
)
SECTIONS = {
    f.name: type(getattr(settings_from(default.get_config()), f.name))
    for f in dataclasses.fields(Settings)
    if f.name not in ("seed", "teachers")
}


def with_value(path: str, value: object) -> dict:
    """The default config with any value anywhere: a ConfigDict would object."""
    config = default.get_config().to_dict()
    place = config
    *sections, name = path.split(".")
    for section in sections:
        place = place[section]
    place[name] = value
    return config


@pytest.mark.parametrize("section", SECTIONS)
def test_default_config_documents_every_knob_with_its_default(section):
    documented = default.get_config()[section].to_dict()
    assert documented == dataclasses.asdict(SECTIONS[section]())


def test_the_objective_is_the_documented_one():
    assert settings_from(default.get_config()).objective == Objective()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name):
    module = importlib.import_module(f"topd_jax.configs.{name}")
    settings = settings_from(module.get_config())
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()


def test_plain_mappings_serve_as_well():
    plain = json.loads(json.dumps(default.get_config().to_dict()))
    assert settings_from(plain) == settings_from(default.get_config())


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("optimizer.learning_rte", "config.optimizer.learning_rate"),
        ("objective.windows", "config.objective.window"),
        ("optimiser", "config.optimizer"),
        ("data.promt_field", "config.data.prompt_field"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, nearest):
    with pytest.raises(
        ValueError,
        match=rf"unknown config key config\.{path}; the nearest is {nearest} ",
    ):
        settings_from(with_value(path, 1))


def test_a_missing_section_is_named():
    config = default.get_config()
    del config.train
    with pytest.raises(ValueError, match=r"config\.train is missing"):
        settings_from(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.steps", "many", r"steps='many' must be of type int, not str"),
        ("train.steps", 2.5, "steps=2.5 must be of type int, not float"),
        ("train.steps", True, "steps=True must be of type int, not bool"),
        ("train.max_skipped", False, "=False must be of type int, not bool"),
        ("optimizer.eps", False, "eps=False must be of type float, not bool"),
        ("log.tensorboard", 1, "tensorboard=1 must be of type bool, not int"),
        ("data.path", 3, "path=3 must be of type str, not int"),
        ("sweep.seeds", 3, r"seeds=3 must be several of type int.*\(3,\)"),
        ("sweep.seeds", ("a",), "seeds='a' must be of type int, not str"),
        ("objective.fraction", "x", "fraction='x' must be of type float"),
        ("optimizer", 3, "config.optimizer=3 must be a section"),
        ("optimizer.clip", float("nan"), "clip=nan must be a finite number"),
        ("optimizer.clip", float("inf"), "clip=inf must be a finite number"),
    ],
)
def test_a_wrong_type_is_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        settings_from(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value", "bound"),
    [
        ("data.batch_size", 0, "at least 1"),
        ("data.samples", 0, "at least 1"),
        ("data.held_out", 0, "at least 1"),
        ("data.max_prompt_length", 0, "at least 1"),
        ("rollout.max_new_tokens", 0, "at least 1"),
        ("rollout.temperature", -0.5, "at least 0"),
        ("train.steps", -3, "at least 1"),
        ("train.max_skipped", -1, "at least 0"),
        ("optimizer.accumulate", 0, "at least 1"),
        ("optimizer.learning_rate", -1e-3, "at least 0"),
        ("eval.problems", 0, "at least 1"),
        ("eval.final_problems", 0, "at least 1"),
        ("eval.batch_size", 0, "at least 1"),
        ("eval.temperature", -1.0, "at least 0"),
        ("log.top_k", 0, "at least 1"),
        ("checkpoint.keep", 0, "at least 1"),
        ("student.lora_rank", -1, "at least 0"),
        ("student.lora_alpha", 0.0, "above 0"),
        ("student.lora_targets", ("q", "head"), "some of q, k, v, o, gate"),
        ("teacher.lora_rank", 4, "be 0: .*teacher.adapter merges"),
        ("objective.candidates", 0, "at least 1"),
        ("objective.percentile", 101.0, r"in 0\.\.100"),
        ("objective.temperature", 0.0, "above 0"),
        ("objective.guidance_weight", -1.0, "not be negative"),
        ("objective.variant", "tpod", "one of opd, opd.suppress, .*topd"),
        ("data.source", "csv", "one of world, jsonl, tfds, hub"),
        ("data.on_long_prompt", "cut", "one of error, skip"),
        ("offline.shard_size", 0, "at least 1"),
        ("offline.pack_length", -1, "at least 0"),
        ("offline.format", "csv", "one of array_record, jsonl"),
        ("offline.keep", "good", "one of all, correct, complete"),
        ("eval.split", "dev", "one of train, validation, test"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_bound(path, value, bound):
    section, name = path.split(".")
    with pytest.raises(
        ValueError,
        match=rf"{section}\.{name}={re.escape(repr(value))} must .*{bound}",
    ):
        settings_from(with_value(path, value))


def test_values_that_do_not_fit_together_are_refused():
    config = default.get_config()
    config.optimizer.accumulate = 5
    with pytest.raises(
        ValueError, match=r"32 rows must be divisible by .*accumulate=5"
    ):
        settings_from(config)
    config = default.get_config()
    config.objective.window = 49
    with pytest.raises(
        ValueError, match=r"window=49 must not exceed .*max_new_tokens=48"
    ):
        settings_from(config)


def test_targets_without_a_rank_are_refused():
    with pytest.raises(ValueError, match=r"lora_rank=0 must .*=\('q',\)"):
        settings_from(with_value("student.lora_targets", ("q",)))


def test_what_a_command_line_writes_is_understood():
    config = with_value("sweep.seeds", "0,1,2")
    assert settings_from(config).sweep.seeds == (0, 1, 2)
    config = with_value("sweep.variants", "opd,topd:teacher")
    assert settings_from(config).sweep.variants == ("opd", "topd:teacher")
    config = with_value("objective.threshold", 1)
    assert settings_from(config).objective.threshold == 1.0
    config = with_value("objective.threshold", None)
    assert settings_from(config).objective.threshold is None


def leaves(section: object, path: tuple[str, ...] = ()):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name), value


def changed(section: object, path: tuple[str, ...], value: object) -> object:
    name, *rest = path
    if rest:
        value = changed(getattr(section, name), tuple(rest), value)
    new = object.__new__(type(section))  # past the bounds: any value will do
    for field in dataclasses.fields(section):
        object.__setattr__(new, field.name, getattr(section, field.name))
    object.__setattr__(new, name, value)
    return new


def test_the_fingerprint_changes_with_any_setting():
    settings = settings_from(small_config())
    prints = {settings.fingerprint()}
    free = [tuple(name.split(".")) for name in NO_IDENTITY]
    count = 1
    for path, _ in leaves(settings):
        if path in free:
            continue
        prints.add(changed(settings, path, "another").fingerprint())
        count += 1
        assert len(prints) == count, path
    assert count > 80
    assert settings_from(small_config()).fingerprint() in prints
    for path in free:
        assert changed(settings, path, "another").fingerprint() in prints


def test_settings_at_their_default_do_not_enter_the_fingerprint(monkeypatch):
    made = settings_from(small_config())
    before = made.fingerprint()
    name = "rollout.top_p"
    assert DEFAULTS[name] == made.rollout.top_p
    # With another default the same value counts.
    monkeypatch.setitem(DEFAULTS, name, 0.5)
    assert made.fingerprint() != before
    assert changed(made, ("rollout", "top_p"), 0.5).fingerprint() == before
