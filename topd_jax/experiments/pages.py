"""HTML pages that carry their data, style and script.

They open from a file, without a network, in light and dark.
"""

import math
import pathlib

import jinja2


def write(template: str, path: pathlib.Path, **values: object) -> None:
    """Write a page.

    Args:
      template: file name in ``experiments/templates``; extends ``page.html``.
      path: of the HTML file.
      values: what the template names: "title" and "facts" (name -> text, shown
        at the top) at least. Texts are escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topd_jax", "experiments/templates"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(template).render(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def number_text(value: object) -> str:
    """Return a number to read: "–", "1,300", "0.125", "2.00e-06"."""
    value = number(value)
    if value is None:
        return "–"
    if value == int(value):
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 3}f}"


def number(value: object) -> float | int | None:
    """Return a finite number with six digits, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def range_text(low: object, high: object) -> str:
    """Return " (0.700 to 0.900)", or nothing where an end is unknown."""
    if number(low) is None or number(high) is None:
        return ""
    return f" ({number_text(low)} to {number_text(high)})"
