"""Pieces: functions that name what they need as their parameters.

A piece is a function, a ``functools.partial``, or a frozen dataclass with
``__call__`` where it has options. Parameters without a default are needs; the
step computes them and passes them by name.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.objectives.statistics import pick
from topd_jax.settings import check

Piece = Callable[..., Any]


class Bounded:
    """Check the options of a dataclass of this kind when one is made.

    They are fields of :func:`topd_jax.settings.setting`.

    Raises:
      ValueError: with the value and its bound.
    """

    def __post_init__(self) -> None:
        check(self)


def row_wise(weight: Piece) -> Piece:
    """Mark a token weight that each row gives by itself.

    It is then computed while the student is trained, from the states at hand,
    and a batch may be worked through in slices. A weight that compares rows
    must not be marked.

    Args:
      weight: a function, or a class of pieces.

    Returns:
      The same.
    """
    weight.row_wise = True
    return weight


def is_row_wise(weight: Piece) -> bool:
    """Return whether a token weight was marked by :func:`row_wise`."""
    if getattr(weight, "row_wise", False):
        return True
    return isinstance(weight, functools.partial) and is_row_wise(weight.func)


def needs(piece: Piece, *, after: int = 0) -> frozenset[str]:
    """Return the names of a piece's parameters that have no default.

    Args:
      piece: a function, a ``functools.partial`` or a callable object.
      after: parameters to leave out, from the first: 2 for a function of
        both models' log-probabilities.

    Raises:
      ValueError: for something that cannot be called.
    """
    if not callable(piece):
        raise ValueError(
            f"{piece!r} is no piece of an objective; it must be a function or "
            "have __call__"
        )
    parameters = list(inspect.signature(piece).parameters.values())[after:]
    return frozenset(
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
    )


def ask(piece: Piece, offered: Mapping[str, Any]) -> Any:
    """Call a piece with what it names.

    Args:
      piece: any.
      offered: name -> value.

    Returns:
      What the piece returns.
    """
    return piece(**{name: offered[name] for name in needs(piece)})


def require_rows(where: str, piece: Piece, offered: set[str]) -> None:
    """Refuse what is no function of both models' log-probabilities.

    Args:
      where: what the piece is, for the error.
      piece: any; it is tried on one token, so that bad options are refused.
      offered: what it may name after its first two parameters.

    Raises:
      ValueError: naming the piece.
    """
    if not callable(piece) or len(inspect.signature(piece).parameters) < 2:
        raise ValueError(
            f"{where}: {piece!r} must be a function of student_logp and "
            "teacher_logp"
        )
    require_names(where, piece, offered, after=2)
    _try_on_a_token(piece)


def _try_on_a_token(piece: Piece) -> None:
    """Trace a piece on one token, so that bad options are refused now.

    Of few logits, and where those will not do, of many. An error that differs
    between the two is about a vocabulary's size, which the step knows.
    """
    rows = {
        "tokens": jax.ShapeDtypeStruct((1,), jnp.int32),
        "uniforms": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    errors = []
    for vocab in (4, 2**18):
        logp = jax.ShapeDtypeStruct((1, vocab), jnp.float32)
        try:
            out = jax.eval_shape(piece, logp, logp, **pick(piece, rows))
        except (TypeError, ValueError) as error:
            errors.append(error)
            continue
        if out.shape != (1,):
            raise ValueError(
                f"{spelled(piece)} returns {list(out.shape)} for one token of "
                f"{vocab} logits; it must return one number a token, [1]"
            )
        return
    if str(errors[0]) == str(errors[1]):
        raise errors[0]


def require_names(
    where: str,
    piece: Piece,
    offered: frozenset[str] | set[str],
    after: int = 0,
) -> None:
    """Refuse a piece that names what is not offered.

    Args:
      where: what the piece is, for the error.
      piece: any.
      offered: the names that it may have.
      after: parameters to leave out, from the first.

    Raises:
      ValueError: naming the piece, its names and those offered.
    """
    unknown = sorted(needs(piece, after=after) - offered)
    if unknown:
        raise ValueError(
            f"{where}: {spelled(piece)} names {', '.join(unknown)}; it may "
            f"name {', '.join(sorted(offered))}, and options need a default"
        )


def spelled(piece: Any) -> str:
    """Spell a function or class as "module:name"."""
    if isinstance(piece, functools.partial):
        return spelled(piece.func)
    if not hasattr(piece, "__qualname__"):
        piece = type(piece)
    return f"{piece.__module__}:{piece.__qualname__}"


def describe(value: Any) -> Any:
    """Describe an objective, or a piece, as JSON-able data.

    Two objectives with one description train alike: it is what a checkpoint
    knows an objective by.

    Args:
      value: dataclasses, functions, partials, numbers, arrays, and tuples of
        them.

    Returns:
      Nested dictionaries and lists; functions by qualified name and what they
      have bound.
    """
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.size > 1:
            sha = hashlib.sha256(array.tobytes()).hexdigest()[:16]
            return f"{array.dtype}{list(array.shape)} {sha}"
        value = array.item() if array.size else None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in sorted(value.items())}
    out = {"": spelled(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            out[field.name] = describe(getattr(value, field.name))
    elif isinstance(value, functools.partial):
        out |= {str(i): describe(v) for i, v in enumerate(value.args)}
        out |= describe(value.keywords)
    elif getattr(value, "__closure__", None):
        cells = zip(value.__code__.co_freevars, value.__closure__, strict=True)
        out |= {name: describe(cell.cell_contents) for name, cell in cells}
    return out if len(out) > 1 else out[""]
