"""HTML pages that carry their data, style and script.

They open from a file, without a network, in light and dark.
"""

import json
import pathlib
from typing import Any

import jinja2


def write(
    template: str, data: Any, path: pathlib.Path, **about: object
) -> None:
    """Writes a page.

    Args:
      template: file name in ``experiments/templates``; it extends ``page.html``.
      data: JSON-able, without NaN; what its script reads.
      path: of the HTML file.
      about: "title", and "facts", name -> text, shown at the top.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topd_jax", "experiments/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    # A "</script>" or "<!--" in a completion must not end the data.
    text = json.dumps(data, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    page = environment.get_template(template).render(data=text, **about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
