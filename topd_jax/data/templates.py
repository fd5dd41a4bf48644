"""What a teacher reads instead of the student's prompt: privileged context.

A template over the fields of a record, or the record's own ``teacher_prompt``,
puts a verified solution, feedback or a skill before the completion that the
student wrote without it (OPSD, arXiv:2601.18734). The paper has one prompt for
both.
"""

import math
import numbers
import string
from collections.abc import Mapping, Sequence
from typing import Any

from topd_jax.data.settings import DataSettings

# A record's own; it comes before the template.
OWN_FIELD = "teacher_prompt"


def check_templates(student: str, templates: Mapping[str, str]) -> None:
    """Refuse templates that name no field, and one for the student.

    Args:
      student: ``student.prompt``.
      templates: of each teacher by name, "" for the only one; "" where it
        reads the student's prompt.

    Raises:
      ValueError: naming the setting.
    """
    if student:
        raise ValueError(
            f"student.prompt={student!r} must be '': the student reads "
            "data.prompt_field; teacher.prompt says what its teacher reads"
        )
    for name, template in templates.items():
        if template:
            _check(template, _setting(name))


def teacher_width(data: DataSettings) -> int:
    """Return how many tokens a teacher reads instead of a prompt, at most.

    Args:
      data: its lengths.
    """
    return data.max_teacher_prompt_length or data.max_prompt_length


def _check(template: str, setting: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{setting}={template!r} is no template ({error}); write {{{{ and "
            "}} for braces that are text"
        ) from error
    fields = [part[1:] for part in parts if part[1] is not None]
    if not fields or any(not name or spec or how for name, spec, how in fields):
        raise ValueError(
            f"{setting}={template!r} must name fields of a record in braces, "
            "at least one: '{question} The answer is {answer}.'; '' lets the "
            "teacher read the student's prompt"
        )


def teacher_prompt(
    row: Mapping[str, Any], teacher: str, template: str, source: str
) -> str | None:
    """Return what the teacher of a row reads instead of the prompt.

    Args:
      row: of the data, whose ``teacher_prompt`` comes first.
      teacher: its name; "" for the only one.
      template: of this teacher, that :func:`check_templates` let pass; "" for
        none.
      source: where the row came from, for errors.

    Returns:
      The text; None for the student's prompt.

    Raises:
      ValueError: for a field that is missing or holds no text.
    """
    if not is_missing(row.get(OWN_FIELD)):
        return _field(row, OWN_FIELD, source, "the teacher's prompt")
    if not template:
        return None
    setting = _setting(teacher)
    return "".join(
        literal + (_field(row, name, source, setting) if name else "")
        for literal, name, _, _ in string.Formatter().parse(template)
    )


def require_same_prompts(
    records: Sequence[Mapping[str, Any]], command: str
) -> None:
    """Refuse prompts of the teachers' own.

    Args:
      records: of the run.
      command: that needs one prompt for both models, for the error.

    Raises:
      ValueError: where a teacher reads something else than the student.
    """
    if any(OWN_FIELD in record for record in records):
        raise ValueError(
            f"with {command} the teacher reads the student's prompts: leave "
            "teacher.prompt out, and rename a teacher_prompt that records have"
        )


def _setting(teacher: str) -> str:
    return f"teachers.{teacher}.prompt" if teacher else "teacher.prompt"


def is_missing(value: object) -> bool:
    """Tell whether a record's field holds nothing: null, NaN or blanks."""
    # Tables that are made into JSON spell what is missing as null or NaN.
    blank = isinstance(value, str | bytes) and not value.strip()
    nan = isinstance(value, numbers.Real) and math.isnan(value)
    return value is None or blank or nan


def _field(row: Mapping[str, Any], name: str, source: str, whose: str) -> str:
    value = as_text(row.get(name), source)
    if is_missing(value) or not isinstance(value, str | numbers.Real):
        raise ValueError(
            f'{source} has no text in the field "{name}" ({whose}); its '
            f"fields are {sorted(row)}; name one of them, or repair the record"
        )
    return str(value)


def as_text(value: object, source: str) -> object:
    """Decode bytes; refuse text that no file and no tokenizer can hold.

    Args:
      value: of a record's field; other types than text pass.
      source: where the record came from, for the error.

    Raises:
      ValueError: for what is not Unicode.
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            f"{source} is not Unicode text ({error}); repair or remove it"
        ) from error
    return value
