"""Writes figures into the table of families in the README of the models room.

    TOPD_PARITY=notebooks/results/families.jsonl \\
        python -m pytest -m slow tests/test_families.py -k agrees
    python tests/families_table.py

The first appends how far each tiny model is off transformers' to the record;
of a model that is there twice the last line counts. Which models a family is
and what it has are kept as the table has them.
"""

from pathlib import Path

from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.wrappers import WRAPPERS
from topd_jax.training.logging import read_jsonl

ROOT = Path(__file__).parents[1]
README = ROOT / "topd_jax" / "models" / "README.md"
RECORD = ROOT / "notebooks" / "results" / "families.jsonl"
KEYS = ("logits", "gradients")


def table(text):
    """The lines of the table, from itself, the registry and the record."""
    cases = {row["case"]: row for row in read_jsonl(RECORD)}
    head, rule, *rows = text.splitlines()
    told = {row.split("`")[1]: row.split(" | ")[1:3] for row in rows}
    lines = [head, rule]
    for name, family in FAMILIES.items():
        own = [row for row in cases.values() if row["model_type"] == name]
        figures = [f"{max(r[k] for r in own):.0e}" for k in KEYS] if own else []
        figures += [str(sum(row["greedy"] for row in own))] if own else []
        cells = [f"`{name}`", *told[name]]
        cells += ["yes" if family.gguf else "", *(figures or [""] * 3)]
        lines.append(f"| {' | '.join(cells)} |")
    for name in WRAPPERS:
        text = "the text part of a model that reads images, by its own family"
        lines.append(f"| `{name}` | | {text} | | | | |")
    return [
        line.replace("|  |", "| |").replace("|  |", "| |") for line in lines
    ]


def updated(text):
    """The README with the table of today."""
    begin = text.index("| `model_type` |")
    end = text.index("\n\n", begin)
    return text[:begin] + "\n".join(table(text[begin:end])) + text[end:]


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
