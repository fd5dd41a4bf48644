"""``topd settings``: every setting with its default, bounds and meaning."""

import re

from topd_jax.training import config


def explain(name: str = "") -> str:
    """Explain settings.

    Args:
      name: part of a setting's dotted name, of one of config.teachers as of
        config.teacher; "" takes all of them.

    Returns:
      One line a setting; all of them under headings of their sections.

    Raises:
      ValueError: where no setting has it.
    """
    text = config.explain()
    if not name:
        return text
    part = re.sub(r"\bteachers\.[\w-]+\.", "teacher.", name)
    lines = [
        line for line in text.splitlines() if part in line.partition(" = ")[0]
        and " = " in line
    ]  # fmt: skip
    if not lines:
        raise ValueError(
            f"no setting has {name!r} in its name; topd settings prints all"
        )
    return "\n".join(lines)
