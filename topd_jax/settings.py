"""Settings: frozen dataclasses whose fields carry bounds and a help text.

Each room declares its own with :func:`setting`. :func:`build` turns nested
mappings into them and refuses unknown keys and wrong types, :func:`check`
refuses values out of bounds, before anything is loaded. :func:`parse_json`
does so for files.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence

# Counts, sizes and seeds that the libraries below take.
_LARGEST = 2**32 - 1


def setting(
    default: typing.Any,
    text: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> typing.Any:
    """Declare a field of a settings dataclass.

    Args:
      default: its default.
      text: what it is, with unit and source.
      least: smallest value allowed; bounds of a tuple hold for each item.
      most: largest value allowed.
      above: values must be greater.
      below: values must be smaller.
      choices: the values allowed, where they are few; of a tuple each item.

    Returns:
      The field. :func:`check` tests the bounds.
    """
    bounds = dict(least=least, most=most, above=above, below=below)
    metadata = {"text": text, "choices": tuple(choices), **bounds}
    return dataclasses.field(default=default, metadata=metadata)


_TESTS = {
    "least": (lambda value, bound: value >= bound, "at least"),
    "most": (lambda value, bound: value <= bound, "at most"),
    "above": (lambda value, bound: value > bound, "above"),
    "below": (lambda value, bound: value < bound, "below"),
}


def check(instance: object, path: str = "") -> None:
    """Check every field of a settings dataclass against its bounds.

    Args:
      instance: whose fields were made by :func:`setting`; None passes where
        it is a field's default.
      path: dotted name of the section, for errors.

    Raises:
      ValueError: with the value, the bound and the section.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, limits = getattr(instance, field.name), field.metadata
        if not limits or (value is None and field.default is None):
            continue
        name = f"{path}.{field.name}" if path else field.name
        known = _checked(value, hints[field.name], name)
        if isinstance(value, str) and not isinstance(known, str):
            kinds = f"{type(known).__name__}, not str"  # only read as one
            raise ValueError(wrong_type(name, repr(value), kinds))
        several = isinstance(value, tuple | list)
        items = value if several else (value,)
        if limits["choices"] and not set(items) <= set(limits["choices"]):
            raise ValueError(
                f"{name}={value!r} must be {'some' if several else 'one'} of "
                f"{', '.join(map(repr, limits['choices']))}"
            )
        bounds = {k: limits[k] for k in _TESTS if limits[k] is not None}
        if any(type(n) is int and n > _LARGEST for n in items):
            bounds.setdefault("most", _LARGEST)
        if not all(
            _TESTS[kind][0](number, bound)
            for number in items
            for kind, bound in bounds.items()
        ):
            spelled = " and ".join(
                f"{_TESTS[kind][1]} {bound}" for kind, bound in bounds.items()
            )
            raise ValueError(f"{name}={value!r} must be {spelled}")


def build(cls: type, config: Mapping, path: str) -> typing.Any:
    """Check a section and turn it into its dataclass.

    Args:
      cls: the dataclass; a field that is a dataclass is a section of its own,
        one of ``dict[str, SomeDataclass]`` holds sections by any name.
      config: a ConfigDict, or nested mappings.
      path: dotted name of the section, for errors.

    Returns:
      An instance of ``cls``; a key that is not given takes its default.

    Raises:
      ValueError: an unknown key (naming the nearest), what is no section, a
        value of the wrong type; and what the class itself refuses.
    """
    _require_section(config, path)
    hints, values = typing.get_type_hints(cls), {}
    for key in config:
        name = f"{path}.{key}"
        if key not in hints:
            raise ValueError(unknown_key(name, list(hints), path))
        value, kind = config[key], hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = build(kind, value, name)
        elif typing.get_origin(kind) is dict:
            _require_section(value, name)
            item = typing.get_args(kind)[1]
            values[key] = {
                inner: build(item, value[inner], f"{name}.{inner}")
                for inner in sorted(value.keys())
            }
        else:
            values[key] = _checked(value, kind, name)
    return cls(**values)


def _require_section(config: object, path: str) -> None:
    # A ConfigDict is no Mapping.
    if not hasattr(config, "keys"):
        raise ValueError(
            f"{path}={config!r} must be a section with the keys of "
            f"{path}; topd settings prints them"
        )


def unknown_key(name: str, choices: list[str], path: str) -> str:
    """Spell the error for a key that does not exist, with the nearest one.

    Args:
      name: the dotted name that was given.
      choices: the keys that exist there.
      path: dotted name of the place they exist in.

    Returns:
      One line.
    """
    if not choices:
        return (
            f"unknown config key {name}: {path} is empty, and its sections "
            "are made in the config file"
        )
    near = difflib.get_close_matches(
        name.split(".")[-1], choices, n=1, cutoff=0
    )
    section = f"{path}.".removeprefix("config.")
    return (
        f"unknown config key {name}; the nearest is {path}.{near[0]}; topd "
        f"settings {section}".rstrip()
        + " prints all"
    )


def wrong_type(name: str, value: object, kind: str) -> str:
    """Spell the error for a value of the wrong type.

    Args:
      name: of the setting.
      value: that was given, spelled.
      kind: what it must be.

    Returns:
      One line.
    """
    text = f"{name}={value} must be of type {kind}"
    if name.startswith("config."):
        text += f"; topd settings {name.removeprefix('config.')} explains it"
    return text


def _checked(value: object, kind: object, name: str) -> object:
    if typing.get_origin(kind) is types.UnionType:
        if value is None:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [v for v in value.split(",") if v]
        if not isinstance(value, Sequence):
            raise ValueError(
                f"{name}={value!r} must be several of type {item.__name__}; "
                f"try ({value!r},)"
            )
        return tuple(_checked(v, item, name) for v in value)
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_bool:
        value = float(value)
    digits = kind is int and isinstance(value, str)
    if digits and re.fullmatch("-?[0-9]{1,20}", value):
        value = int(value)
    # Python's True is an int, a setting's is not.
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        kinds = f"{kind.__name__}, not {type(value).__name__}"
        raise ValueError(wrong_type(name, repr(value), kinds))
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    if kind is str and "\0" in value:
        raise ValueError(f"{name}={value!r} must have no zero bytes")
    return value


def parse_call(
    text: str, name: str, example: str
) -> tuple[str, dict[str, typing.Any]]:
    """Split "NAME(option=value, ...)" into name and options.

    Args:
      text: "NAME" or "NAME(option=value, ...)", values as Python literals;
        "module:function" is a name too.
      name: of the setting, for the error.
      example: of what can be read, for the error.

    Returns:
      (name, options).

    Raises:
      ValueError: for anything else.
    """
    match = re.fullmatch(
        r"\s*(\w[\w.]*(?::[\w.]+)?)\s*(\(.*\))?\s*", text, re.S
    )
    try:
        function, arguments = match.groups()
        call = ast.parse(f"f{arguments or '()'}", mode="eval").body
        if call.args or not isinstance(call.func, ast.Name):
            raise SyntaxError
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if None in options or len(options) < len(call.keywords):
            raise SyntaxError
    except Exception as error:  # whatever Python's parser raises
        raise ValueError(
            f"{name}={text!r} cannot be read; write NAME or "
            f"NAME(option=value, ...), for instance {example}"
        ) from error
    return function, options


def parse_json(data: bytes, where: str, way_out: str = "") -> typing.Any:
    """Parse JSON of a file that others wrote.

    Args:
      data: the file, or a line of it, in UTF-8.
      where: it is, for the error.
      way_out: for the error; "": repair it, or convert it to UTF-8.

    Returns:
      The value.

    Raises:
      ValueError: for another encoding, what is no JSON, and brackets that
        nest too deeply.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text[:4]:  # "{" of two bytes or four
            raise ValueError("zero bytes; is it UTF-16? convert it to UTF-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        fault, advice = f"UTF-8 ({error})", "convert it to UTF-8"
    except (ValueError, RecursionError) as error:
        fault, advice = f"JSON ({error})", "repair or remove it"
    raise ValueError(
        f"{where} is not {fault}: {data[:60]!r}; {way_out or advice}"
    )
