"""Settings: defaults, bounds, and what is wrong is named before anything."""

import ast
import dataclasses
import importlib
import json
import typing
from pathlib import Path

import pytest
from small_run import settings_with, small_config
from test_bad_settings import NAMES

import topd_jax
from topd_jax import configs
from topd_jax.cli.settings import explain as explain_part
from topd_jax.configs import default
from topd_jax.training import config as config_module
from topd_jax.training.config import (
    NO_IDENTITY,
    Settings,
    explain,
    settings_from,
)

PACKAGE = Path(topd_jax.__file__).parent
SHIPPED = sorted(
    p.stem
    for p in Path(configs.__file__).parent.glob("*.py")
    if p.stem != "__init__"
)
SECTIONS = {
    name: kind
    for name, kind in typing.get_type_hints(Settings).items()
    if dataclasses.is_dataclass(kind)
}


def test_the_default_config_has_every_setting_at_its_default():
    config = default.get_config()
    assert settings_from(config) == Settings()
    plain = json.loads(json.dumps(config.to_dict()))
    assert settings_from(plain) == Settings()
    assert settings_from({}) == Settings()


def test_every_shipped_config_loads():
    for name in SHIPPED:
        module = importlib.import_module(f"topd_jax.configs.{name}")
        told = settings_from(module.get_config()).to_dict()
        assert json.loads(json.dumps(told)) == told


def test_every_setting_is_explained_with_default_and_bounds():
    lines = explain().splitlines()
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            start = f"config.{section}.{field.name} = {field.default!r}"
            (line,) = (x for x in lines if x.startswith(start))
            assert line.rpartition(": ")[2].strip(), line
    (line,) = (x for x in lines if "optimizer.beta1" in x)
    assert "(least 0, below 1)" in line
    (line,) = (x for x in lines if "data.source" in x)
    assert "'world' | 'jsonl' | 'tfds' | 'hub'" in line
    assert explain_part("teachers").startswith("config.teachers = {}: name -> ")
    # As errors name it.
    (line,) = explain_part("teachers.math.dtype").splitlines()
    assert line.startswith("config.teacher.dtype = 'float32'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.accumulate": 5}, "32 rows must be divisible .*=5"),
        ({"student.lora_targets": ("q", "head")}, "must be some of 'q', 'k', "),
        ({"student.lora_targets": ("q",)}, r"lora_rank=0 must .*=\('q',\)"),
        ({"student.lora_alpha": 8.0}, "lora_rank=0 must be .*lora_alpha=8.0"),
        ({"teacher.lora_rank": 4}, "be 0: .*teacher.adapter merges"),
        ({"student.quantize": "int8"}, "would freeze what is to learn"),
        ({"offline.path": "somewhere"}, "needs train.stage=offline"),
        ({"data.end_ids": (999,)}, r"end_ids=\(999,\) must be \(\) in the tin"),
        ({"world.student_heads": 5}, "width=96 must be divisible by .*heads=5"),
        ({".objective": "topd(window='9')"}, "='9' must be of type int, not s"),
        ({".objective": "topd(window=49)"}, "=49 must not exceed .*tokens=48"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes, message):
    config = default.get_config().to_dict()
    for path, value in changes.items():
        section, name = path.split(".")
        (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message):
        settings_from(config)


def test_strings_of_a_command_line_are_understood():
    made = settings_from({"sweep": {"seeds": "0,1,2"}})
    assert made.sweep.seeds == (0, 1, 2)
    for text, size in (("64", 64), (None, None)):
        made = settings_from({"train": {"chunk_size": text}})
        assert made.train.chunk_size == size


# --- every setting is read ------------------------------------------------


def test_every_setting_is_read_somewhere():
    """By a module that names its section, or the class of that."""
    known = {section: set() for section in SECTIONS}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "settings.py":
            continue  # where the class is defined nothing is read
        nodes = list(ast.walk(ast.parse(path.read_text())))
        reads = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        names = reads | {n.id for n in nodes if isinstance(n, ast.Name)}
        for section, kind in SECTIONS.items():
            if {section, kind.__name__} & names:
                known[section] |= reads
    # Those of a mesh are passed on as arguments, all of them.
    known["mesh"] |= {f.name for f in dataclasses.fields(SECTIONS["mesh"])}
    for section, kind in SECTIONS.items():
        fields = {f.name for f in dataclasses.fields(kind)}
        assert fields <= known[section], section


# --- the fingerprint ------------------------------------------------------


def replaced(section: object, path: tuple[str, ...], value: object) -> object:
    """Past the bounds: any value will do."""
    name, *rest = path
    if rest:
        value = replaced(getattr(section, name), tuple(rest), value)
    new = object.__new__(type(section))
    vars(new).update(vars(section) | {name: value})
    return new


def test_the_fingerprint_changes_with_any_setting():
    settings = settings_from(small_config())
    prints = {settings.fingerprint()}
    assert settings_with().fingerprint() in prints
    paths = {tuple(name.split(".")) for name in NAMES} - {("teachers",)}
    free = {tuple(name.split(".")) for name in NO_IDENTITY}
    for path in sorted(paths - free):
        prints.add(replaced(settings, path, "another").fingerprint())
    assert len(prints) == 1 + len(paths - free) > 80
    for path in free:
        assert replaced(settings, path, "another").fingerprint() in prints


def test_settings_at_their_default_do_not_enter_the_fingerprint(monkeypatch):
    made = settings_from(small_config())
    before, name = made.fingerprint(), "rollout.top_p"
    known = config_module.defaults_of({})
    assert known[name] == made.rollout.top_p
    # With another default the same value counts.
    other = known | {name: 0.5}
    monkeypatch.setattr(config_module, "defaults_of", lambda _: other)
    assert made.fingerprint() != before
    at_default = replaced(made, ("rollout", "top_p"), 0.5)
    assert at_default.fingerprint() == before
