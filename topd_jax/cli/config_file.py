"""Config files of the command line, and overrides of their settings."""

import ast
import os
import pathlib
import re
import runpy
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from topd_jax.settings import unknown_key, wrong_type
from topd_jax.training.config import Settings, settings_from

# Between commas, but for those of calls and of tuples in calls.
_PARTS = re.compile(r"(?:[^,(]|\((?:[^()]|\([^()]*\))*\)|\()+")
_OVERRIDE = re.compile(r"--?config\.([^=]*)(?:=(.*))?", re.DOTALL)


def load_settings(name: str, overrides: Sequence[str] = ()) -> Settings:
    """Run a config file, change settings, and check all of them.

    Args:
      name: see :func:`config_path`.
      overrides: "--config.section.key=value" each.

    Returns:
      The settings.

    Raises:
      ValueError: for a file that gives no config, a key that does not exist
        or a value that it cannot have.
    """
    config = read_config(config_path(name))
    for argument in overrides:
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            raise ValueError(
                f"unexpected arguments: {argument}; topd COMMAND --help lists "
                "the flags of a command"
            )
        path, text = match.groups()
        section, key = _place(config, path)
        if text is None:
            raise ValueError(f"{argument} needs a value: {argument}=VALUE")
        try:
            section[key] = _value(section, key, text)
        except TypeError as error:
            kind = section.get_type(key).__name__
            raise ValueError(
                wrong_type(f"config.{path}", text, kind)
            ) from error
    return settings_from(config)


def _place(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """Return the section and the key of a setting that exists."""
    *sections, last = path.split(".")
    name = "config"
    for key in (*sections, last):
        if not isinstance(config, ConfigDict):
            raise ValueError(f"{name} has no keys; it is {config!r}")
        if key not in config:
            raise ValueError(unknown_key(f"{name}.{key}", list(config), name))
        section, config, name = config, config[key], f"{name}.{key}"
    if isinstance(config, ConfigDict):
        keys = ", ".join(f"{name}.{key}" for key in list(config)[:3])
        raise ValueError(
            f"{name} is a section; set one of its keys: {keys}, ..."
        )
    return section, last


def _value(section: ConfigDict, key: str, text: str) -> Any:
    """Read a value of a setting's type, or else return the text."""
    kind = section.get_type(key)
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "false": False, "none": None}
        return words.get(text.lower(), text)
    try:
        value = float(text) if kind is float else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        if text == "None":
            return None
        if kind is not tuple:
            return text
        # "opd, topd(window=20, fraction=0.5)" without quotes, and "" for none.
        value = list(filter(None, map(str.strip, _PARTS.findall(text))))
    if kind is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return value


def config_path(name: str) -> str:
    """Find a config: a path, or the name of one that is shipped.

    Args:
      name: path of a Python file, or "tiny" for ``configs/tiny.py``.

    Returns:
      An existing path.

    Raises:
      ValueError: naming what is shipped.
    """
    if os.path.isfile(path := os.path.expanduser(name)):
        return path
    from topd_jax import configs

    folder = pathlib.Path(configs.__file__).parent
    shipped = sorted(
        p.stem for p in folder.glob("*.py") if p.stem != "__init__"
    )
    stem = pathlib.Path(name).stem
    if stem in shipped and pathlib.Path(name).parent.name in ("", "configs"):
        return str(folder / f"{stem}.py")
    raise ValueError(
        f"--config {name} does not exist; give a path, or one of "
        f"{', '.join(shipped)}"
    )


def read_config(path: str) -> ConfigDict:
    """Run a config file.

    Args:
      path: of a Python file with ``get_config()``.

    Returns:
      What ``get_config()`` gives.

    Raises:
      ValueError: with the file's own error, or for a file that gives none.
    """
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config() if get_config else None
    except Exception as error:  # whatever the user's file raises
        cause: BaseException = error
        # A ConfigDict wraps its errors.
        while cause.args and isinstance(cause.args[0], BaseException):
            cause = cause.args[0]
        text = cause.args[0] if isinstance(cause, KeyError) else cause
        raise ValueError(
            f"--config {path} does not run: {type(error).__name__}: {text}; "
            "topd settings prints every key and its type"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config {path} must define get_config() that returns a "
            "ConfigDict; start from configs/tiny.py"
        )
    return config
