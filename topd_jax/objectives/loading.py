"""Objectives by name: ``"topd(context='student', window=20)"``.

The name is a preset's, or "package.module:function" for a function that
returns an :class:`~topd_jax.objectives.objective.Objective`. Its options are
its parameters, and those of the pieces that it is made of: ``window`` is the
near future's, ``log_floor`` the token loss's. A piece itself is chosen by name
too: ``detector='future_loss'``, ``token_loss='my_package.my_module:loss'``.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from topd_jax.losses import token_losses
from topd_jax.losses.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from topd_jax.objectives.objective import (
    FutureLoss,
    Objective,
    Transport,
    at_random,
    own_loss,
    teacher_loss,
)
from topd_jax.objectives.pieces import spelled
from topd_jax.objectives.presets import PRESETS
from topd_jax.settings import parse_call

# Parameters that are pieces -> the names that stand for one.
PIECES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "token_loss": {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": generalized_jsd,
        "clipped_reverse_kl": token_losses.clipped_reverse_kl,
        "clipped_forward_kl": token_losses.clipped_forward_kl,
        "forward_kl_at_high_loss": token_losses.forward_kl_at_high_loss,
    },
    "ranking": {
        "teacher_loss": teacher_loss,
        "token_loss": own_loss,
        "random": at_random,
    },
    "detector": {"transport": Transport, "future_loss": FutureLoss},
}
# Parameters of the divergences that are no options of a run.
_ARRAYS = ("axis", "where")


def make_objective(text: str) -> Objective:
    """Make the objective that a config names.

    Args:
      text: "NAME" or "NAME(option=value, ...)"; see the module.

    Returns:
      The objective.

    Raises:
      ValueError: for an unknown name or option, or a value out of bounds.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"objective={text!r:.60} is no text such as 'topd'; an Objective "
            "is used as it is: topd.train(..., objective=it)"
        )
    return (_make.__wrapped__ if names_code(text) else _make)(text)


def names_code(text: str) -> bool:
    """Tell whether an objective names code that is not the package's."""
    return ":" in text


@functools.lru_cache
def _make(text: str) -> Objective:
    """Make an objective; the same one for the same text."""
    name, options = parse(text)
    function = PRESETS.get(name) or _imported(name, "objective", PRESETS)
    unused = set(options)
    try:
        if not callable(function):
            raise ValueError(f"{name} is {function!r}; it must be a function")
        objective = _build(function, options, unused)
    except ValueError as error:
        raise ValueError(f"objective={text!r}: {error}") from error
    if unused:
        raise ValueError(f"objective={text!r}: {_misfit(function, unused)}")
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective={text!r} returns {type(objective).__name__}; it must "
            "return a topd_jax.Objective"
        )
    return objective


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split an objective's spelling into name and options.

    Args:
      text: "NAME" or "NAME(option=value, ...)", values as Python literals.

    Returns:
      (name, options).

    Raises:
      ValueError: for anything else.
    """
    return parse_call(text, "objective", "topd(context='student')")


def spell(name: str, **options: Any) -> str:
    """Spell an objective for a config; the inverse of :func:`parse`.

    Args:
      name: of a preset, or "module:function".
      **options: of it.

    Returns:
      The text.

    Example:
      >>> spell("topd", context="student", window=20)
      "topd(context='student', window=20)"
    """
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name


def options_of(function: Callable[..., Any]) -> set[str]:
    """Return the options of an objective's function, its pieces' included."""
    out: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if dataclasses.is_dataclass(default) and name not in PIECES:
            out |= options_of(type(default)) - {"select"}
        else:
            out.add(name)
        for piece in PIECES.get(name, {}).values():
            out |= _options_of_piece(piece)
    return out


def _misfit(function: Callable[..., Any], unused: set[str]) -> str:
    """Say why no piece of an objective takes an option."""
    option, options = min(unused), options_of(function)
    if option not in options:
        return f"no option {option}; its options: {', '.join(sorted(options))}"
    owners = [
        f"{kind}={name!r}"
        for kind, choices in PIECES.items()
        for name, piece in choices.items()
        if option in _options_of_piece(piece)
    ]
    return f"{option} is an option of {' or '.join(owners)}; choose that too"


def _options_of_piece(piece: Callable[..., Any]) -> set[str]:
    if isinstance(piece, type):
        return options_of(piece)
    return {
        name
        for name, parameter in inspect.signature(piece).parameters.items()
        if parameter.default is not parameter.empty and name not in _ARRAYS
    }


def _build(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    unused: set[str],
    base: Any = None,
) -> Any:
    """Call a function with the options that it and its pieces have.

    Args:
      function: or dataclass.
      options: of the whole objective.
      unused: the names of those that no piece has taken yet; shrinks.
      base: an instance of the dataclass, whose values are the defaults.

    Raises:
      ValueError: for an option that is needed and not given.
    """
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = parameter.default if base is None else getattr(base, name)
        whole = dataclasses.is_dataclass(value) and name not in PIECES
        if name in options and not whole:
            unused.discard(name)
            value = options[name]
        if name in PIECES:
            if isinstance(value, str):
                value = PIECES[name].get(value) or _imported(
                    value, name, PIECES[name]
                )
            value = _bound(value, options, unused)
        elif dataclasses.is_dataclass(value):
            value = _build(type(value), options, unused, value)
        if value is not parameter.empty:
            arguments[name] = value
        elif parameter.kind is not parameter.VAR_KEYWORD:
            raise ValueError(f"{spelled(function)} needs the option {name}")
    return function(**arguments)


def _bound(
    piece: Callable[..., Any], options: Mapping[str, Any], unused: set[str]
) -> Callable[..., Any]:
    """Give a piece the options that it has."""
    if dataclasses.is_dataclass(piece):
        if isinstance(piece, type):
            return _build(piece, options, unused)
        return _build(type(piece), options, unused, piece)
    if not callable(piece):
        return piece
    own = _options_of_piece(piece)
    taken = {name: x for name, x in options.items() if name in own}
    unused.difference_update(taken)
    return functools.partial(piece, **taken) if taken else piece


def _imported(
    name: str, what: str, choices: Mapping[str, Any]
) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"{what}={name!r} must be one of {', '.join(choices)}, or "
            "'package.module:function'"
        )
    # A console script does not look beside where it is started.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return functools.reduce(
            getattr, attribute.split("."), importlib.import_module(module)
        )
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what}={name!r} cannot be imported ({error}); the module must "
            "be installed, or beside where topd is started"
        ) from error
