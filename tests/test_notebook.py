"""docs/python.ipynb runs as it stands, and names no path of a machine."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.scripts import load_script

DOCS = Path(__file__).resolve().parent.parent / "docs"


def maker() -> ModuleType:
    """The script that executes the notebook."""
    return load_script(DOCS / "make_notebook.py")


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of each code cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [output.get("name", output.output_type) for output in cell.outputs]
        for cell in cells
    ]


def test_the_notebook_shows_its_outputs_and_no_path_of_a_machine() -> None:
    make_notebook = maker()
    notebook = make_notebook.read()

    assert sum(map(bool, outputs(notebook))) > 10
    assert "error" not in {kind for kinds in outputs(notebook) for kind in kinds}
    assert not make_notebook.MACHINE_PATH.search(make_notebook.NOTEBOOK.read_text())


@pytest.mark.matrix
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_notebook = maker()
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = make_notebook.read()
    shown = outputs(notebook)

    make_notebook.execute(notebook, tmp_path)

    assert outputs(notebook) == shown
    assert (tmp_path / "outputs" / "sweeps" / "notebook" / "best" / "adapter").is_dir()
