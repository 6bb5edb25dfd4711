"""Execute docs/python.ipynb anew, with the outputs that it shows.

python docs/make_notebook.py

It takes some minutes on a CPU. The notebook runs in an empty folder; a test of
`make test-matrix` does the same.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "python.ipynb"

MACHINE_PATH = re.compile(
    r"(?<![\w./])/(?:home|opt|private|root|tmp|usr|Users|var|work)/"
)
"""The beginning of a path that is another one on each machine."""


def read() -> Any:
    """Read the notebook."""
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def execute(notebook: Any, folder: Path) -> None:
    """Execute a notebook in a folder, on the CPU; its outputs are replaced.

    Raises:
        CellExecutionError: a cell has raised an error.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The kernel imports this checkout, wherever it runs.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    executor = ExecutePreprocessor(timeout=1200, kernel_name="python3")
    executor.preprocess(notebook, {"metadata": {"path": str(folder)}})
    _normalise(notebook)


def _normalise(notebook: Any) -> None:
    """Join the pieces of each stream, and remove what differs for each execution."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        joined: list[Any] = []
        for output in cell.get("outputs", []):
            last = joined[-1] if joined else None
            if last and output.get("name") and last.get("name") == output["name"]:
                last["text"] += output["text"]
            else:
                joined.append(output)
        if "outputs" in cell:
            cell["outputs"] = joined


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    text = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    leaked = MACHINE_PATH.search(text)
    if leaked:
        sys.exit(f"a path of this machine: {text[leaked.start() :][:80]}")
    NOTEBOOK.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
