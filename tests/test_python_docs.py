"""docs/python.md and docs/python.ipynb run as they stand, and name no path of a machine."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def maker() -> ModuleType:
    """The script that executes the notebook."""
    spec = importlib.util.spec_from_file_location(
        "make_notebook", DOCS / "make_notebook.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_notebook = maker()
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = make_notebook.read()
    shown = outputs(notebook)

    make_notebook.execute(notebook, tmp_path)

    assert outputs(notebook) == shown
    assert (tmp_path / "outputs" / "sweeps" / "notebook" / "best" / "adapter").is_dir()


@pytest.mark.slow
def test_the_blocks_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "python.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)

    assert len(names["frame"]) > 2
    assert len(names["trials"]) == 2
    assert names["again"].status == "completed"
    assert names["again"].config.lora == names["best"].config.lora
    assert len(names["answers"]) == 1
