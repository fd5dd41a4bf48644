"""Writes the table of families into the README of the models room.

    TOPD_PARITY=notebooks/results/families.jsonl \\
        python -m pytest -m slow tests/test_families.py -k agrees
    python tests/families_table.py

The first appends how far each tiny model is off transformers' to the record;
of a model that is there twice the last line counts.
"""

from pathlib import Path

from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.wrappers import WRAPPERS
from topd_jax.training.logging import read_jsonl

ROOT = Path(__file__).parents[1]
README = ROOT / "topd_jax" / "models" / "README.md"
RECORD = ROOT / "notebooks" / "results" / "families.jsonl"
KEYS = ("logits", "gradients")
HEAD = (
    "| `model_type` | checkpoints | beside pre-norms, RoPE, grouped heads, "
    "gated SiLU | GGUF | logits off by | gradients | greedy tokens |",
    "|---|---|---|---|---|---|---|",
)


def table():
    """The lines of the table, from the registry and the record."""
    cases = {row["case"]: row for row in read_jsonl(RECORD)}
    lines = list(HEAD)
    for name, family in FAMILIES.items():
        own = [row for row in cases.values() if row["model_type"] == name]
        figures = [f"{max(r[k] for r in own):.0e}" for k in KEYS] if own else []
        figures += [str(sum(row["greedy"] for row in own))] if own else []
        cells = [f"`{name}`", family.checkpoints, family.about]
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
    before, rest = text.split("| `model_type` |", 1)
    after = rest[rest.index("\n\n") :]
    return before + "\n".join(table()) + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
