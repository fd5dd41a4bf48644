"""Settings that nobody can mean: generated from the settings' own bounds."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st
from small_run import Refusal, attempt, changed, refusal_of

from topd_jax.cli.config_file import load_settings
from topd_jax.objectives.loading import make_objective, options_of
from topd_jax.objectives.objective import Objective
from topd_jax.objectives.presets import PRESETS
from topd_jax.training.config import Settings, settings_from

WRONG = {
    int: ("many", 2.5, True, "²", "9" * 5000, 2**32),
    float: ("low", False, [0.5], float("nan"), float("inf")),
    str: (3, ["x"], "x\0y"),
    bool: (1, "true"),
    tuple: (3, None, {3}, [None], [[1]]),
}


def leaves(kind: type, prefix: str = "") -> typing.Iterator[tuple]:
    """(dotted name, type, field) of every setting."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{name}.")
        elif field.metadata:
            hint = (
                next(
                    (t for t in typing.get_args(hint) if t is not type(None)),
                    hint,
                )
                if field.default is None
                else typing.get_origin(hint) or hint
            )
            yield name, hint, field


LEAVES = list(leaves(Settings))
NAMES = [name for name, *_ in LEAVES]


def out_of_bounds(field: dataclasses.Field, kind: type) -> list:
    """Values just outside, in a tuple where the setting is one."""
    limits = field.metadata
    step = 1e-9 if kind is float else 1
    values = ["no such"] if limits["choices"] else []
    for name, sign in (("least", -1), ("most", 1), ("above", 0), ("below", 0)):
        if (bound := limits[name]) is not None:
            values.append(bound + sign * max(step, step * abs(bound)))
    return [(v,) for v in values] if kind is tuple else values


def values_of(kind: type, field: dataclasses.Field) -> list:
    """What this setting may not be."""
    unset = [] if field.default is None else [None]
    return [*WRONG[kind], *unset, *out_of_bounds(field, kind)]


def nested(name: str, value: object) -> dict:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("name", "kind", "field"), LEAVES, ids=NAMES)
def test_a_value_that_cannot_be_is_refused(name, kind, field):
    """With its name, the value, and what it must be."""
    section, _, key = name.rpartition(".")
    for value in values_of(kind, field):
        line = refusal_of(lambda v=value: settings_from(nested(name, v)))
        shown = value[0] if isinstance(value, list | tuple) and value else value
        assert name in line and f"{shown!r:.9}" in line and " must " in line
        if section:  # from Python too, past every config file
            made = tuple(value) if isinstance(value, list) else value
            line = refusal_of(
                lambda v=made: changed(Settings(), section, **{key: v})
            )
            assert name in line
    wrong = f"{name[:-1]}{'x' if name[-1] != 'x' else 'y'}"
    line = refusal_of(lambda: settings_from(nested(wrong, 1)))
    assert f"unknown config key config.{wrong}; the nearest is config." in line


@pytest.mark.parametrize(
    "section", [f.name for f in dataclasses.fields(Settings) if not f.metadata]
)
def test_a_section_that_is_none_is_refused(section):
    for value in (None, [], {"x": 1}, {3: 1}):
        line = refusal_of(lambda v=value: settings_from({section: v}))
        assert f"config.{section}" in line


@fuzzing(max_examples=75, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(NAMES),
    st.text(max_size=20)
    | st.sampled_from(["(" * 200, "-" * 50_000, "1+" * 20_000 + "1", "{{}}"]),
)
def test_any_text_of_an_override_is_understood_or_refused(name, text):
    override = f"--config.{name}={text}"
    made = attempt(lambda: load_settings("default", [override]))
    assert isinstance(made, Settings | Refusal)


@pytest.mark.parametrize("name", PRESETS)
def test_any_value_of_an_option_is_taken_or_refused(name):
    for option in sorted(options_of(PRESETS[name])):
        for value in ("'x'", "[1]", "{}", "-1e308", "1e999"):
            text = f"{name}({option}={value})"
            made = attempt(lambda text=text: make_objective(text))
            assert isinstance(made, Objective) or text in made


@pytest.mark.parametrize(
    "text",
    ["", "topd(**{'a': 1})", "topd(*[1])", "topd()()", "topd.x", "..:x",
     "os:getcwd", "math:pi", "\ud800", f"topd(window={'[' * 9000})",
     f"topd(window={'9' * 5000})", "opd(token_loss='math:pi')"],
)  # fmt: skip
def test_an_objective_that_means_nothing_is_refused(text):
    assert "objective=" in refusal_of(
        lambda: settings_from({"objective": text})
    )
