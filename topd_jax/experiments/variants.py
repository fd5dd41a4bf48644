"""Entries of a sweep: an objective, with other settings after a ";"."""

import ast
import contextlib
import re

from topd_jax.training.config import Settings, settings_from

BASELINE = "opd"
# What the runs of a sweep may differ in: models and problems are shared.
_SECTIONS = ("offline", "optimizer", "rollout", "train")


def with_variant(settings: Settings, entry: str) -> Settings:
    """Return the settings that an entry of ``sweep.variants`` asks for.

    Args:
      settings: of the sweep.
      entry: an objective as in ``config.objective``, then any number of
        ";section.key=value", such as "opd;train.steps=450".

    Returns:
      The settings of that run.

    Raises:
      ValueError: for an unknown objective, option or key, a key that all runs
        of a sweep share, or a value out of bounds.
    """
    objective, *changes = map(str.strip, entry.split(";"))
    tree = settings.to_dict() | {"objective": objective}
    try:
        for change in changes:
            match = re.fullmatch(
                rf"({'|'.join(_SECTIONS)})\.(\w+)\s*=\s*(.*)", change
            )
            if not match:
                raise ValueError(
                    f"{change!r} must be section.key=value, the section one "
                    f"of {', '.join(_SECTIONS)}; all else is shared"
                )
            section, key, value = match.groups()
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            tree[section][key] = value
        return settings_from(tree)
    except ValueError as error:
        raise ValueError(f"sweep.variants: {entry!r}: {error}") from error
