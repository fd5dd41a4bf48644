"""Nested mappings into frozen dataclasses, every key and type checked (ours).

A key that a section does not have is an error that names the nearest one.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence


def flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings as one mapping.

    Args:
      tree: nested dictionaries.
      prefix: of every name.

    Returns:
      "section.key" -> value.
    """
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def build(cls: type, config: Mapping, path: str) -> typing.Any:
    """Checks a section and turns it into its dataclass.

    Args:
      cls: the dataclass; a field that is a dataclass is a section of its own,
        one of ``dict[str, SomeDataclass]`` holds sections by any name.
      config: a ConfigDict, or nested mappings.
      path: dotted name of the section, for errors.

    Returns:
      An instance of ``cls``; a key that is not given takes its default.

    Raises:
      ValueError: an unknown key (naming the nearest), a missing section, a
        value of the wrong type.
    """
    _require_section(config, path)
    hints = typing.get_type_hints(cls)
    for key in config:
        if key not in hints:
            raise ValueError(unknown_key(f"{path}.{key}", list(hints), path))
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in config:
            if (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise ValueError(f"{path}.{field.name} is missing")
            continue
        value, kind = config[field.name], hints[field.name]
        name = f"{path}.{field.name}"
        if dataclasses.is_dataclass(kind):
            values[field.name] = build(kind, value, name)
        elif typing.get_origin(kind) is dict:
            _require_section(value, name)
            item = typing.get_args(kind)[1]
            values[field.name] = {
                key: build(item, value[key], f"{name}.{key}")
                for key in sorted(value.keys())
            }
        else:
            values[field.name] = _checked(value, kind, name)
    return cls(**values)


def _require_section(config: object, path: str) -> None:
    # A ConfigDict is no Mapping.
    if not hasattr(config, "keys"):
        raise ValueError(
            f"{path}={config!r} must be a section with the keys of "
            f"{path} in configs/default.py"
        )


def unknown_key(name: str, choices: list[str], path: str) -> str:
    """The sentence for a key that does not exist, with the nearest one.

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
    return (
        f"unknown config key {name}; the nearest is {path}.{near[0]} "
        f"(all: {', '.join(sorted(choices))})"
    )


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
                f"{name}={value!r} must be several of type {item.__name__}, "
                f"not {type(value).__name__}; try ({value!r},)"
            )
        return tuple(_checked(v, item, name) for v in value)
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_bool:
        value = float(value)
    if kind is int and isinstance(value, str) and value.lstrip("-").isdigit():
        value = int(value)
    # Python's True is an int, a setting's is not.
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise ValueError(
            f"{name}={value!r} must be of type {kind.__name__}, not "
            f"{type(value).__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    return value
