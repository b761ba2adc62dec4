"""The notebook runs from top to bottom, and what is committed is such a run, with its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for name in ("ipykernel", "matplotlib", "av"):
    pytest.importorskip(name)

PATH = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def outputs(notebook, kind: str) -> list:
    """What the cells show of one MIME type."""
    data = [o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])]
    return [d[kind] for d in data if kind in d]


def test_what_is_committed_is_a_whole_run():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert len(outputs(notebook, "image/png")) >= 6
    assert PATH.stat().st_size < 1_500_000
    # No warnings, which would also name a path of the machine where it ran.
    names = [o.get("name") for c in code for o in c.outputs]
    assert "stderr" not in names


def test_it_runs():
    notebook = nbformat.read(PATH, as_version=4)
    committed = len(outputs(notebook, "image/png"))
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    assert len(outputs(notebook, "image/png")) == committed
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "the same bits: True" in text
