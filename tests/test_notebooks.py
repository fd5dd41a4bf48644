"""The notebooks run from top to bottom, and can be opened in Colab."""

import ast
import json
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/topd-jax/topd_jax/blob/main/"

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS]
)


def assert_pictures(notebook):
    """Its cells drew pictures and ended without errors."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert all(o.output_type != "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3


def test_notebooks_are_there():
    assert [p.stem for p in NOTEBOOKS] == ["colab_tpu", "compose_losses"]


@each_notebook
def test_notebook_is_valid_small_and_has_its_badge(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.reads(json.dumps(json.loads(path.read_text())), 4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert f"({COLAB}notebooks/{path.name})" in first.source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)  # no magics: plain Python runs anywhere
    assert_pictures(notebook)


@pytest.mark.slow
@each_notebook
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("TOPD_QUICK", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures are inline
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # raises what a cell raises
    assert_pictures(notebook)
