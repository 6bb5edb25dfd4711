"""docs/options.md: each option with both engines and each quantization, as it is."""

import importlib.util
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

from finetune.config.sections.lora import CHOOSES_MATRICES
from finetune.config.sections.optimizer import OptimizerName, ScheduleName
from finetune.config.sections.trainer import KEEPS_BASE

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "options.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_options", DOCS / "make_options.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows() -> list[str]:
    """The options of the page's table."""
    lines = PAGE.read_text().splitlines()
    return [line.split("`")[1] for line in lines if line.startswith("| `")]


def test_the_page_has_all_options_of_the_script(script: ModuleType) -> None:
    assert rows() == list(script.options(Path("FOLDER")))


def test_the_page_has_every_optimizer_schedule_and_supported_argument() -> None:
    page = " ".join(rows())
    for optimizer in typing.get_args(OptimizerName):
        assert f"optimizer.name={optimizer}" in rows()
    for schedule in typing.get_args(ScheduleName):
        assert f"optimizer.lr_scheduler_type={schedule}" in rows()
    for argument in CHOOSES_MATRICES:
        assert f"lora.extra.{argument}" in page
    # lr_scheduler_kwargs are those of two schedules; the number of checkpoints changes no run.
    for argument in KEEPS_BASE - {"lr_scheduler_kwargs", "save_total_limit"}:
        assert f"trainer.extra.{argument}" in page


def test_every_reason_is_used_and_every_number_has_one() -> None:
    lines = PAGE.read_text().splitlines()
    cells: set[str] = set()
    for line in lines:
        if line.startswith("| `"):
            cells |= {cell.strip() for cell in line.rsplit("`", 1)[1].split("|")}
    used = cells - {"yes", ""}
    reasons = {line.partition(". ")[0] for line in lines if line[:1].isdigit()}
    assert used == reasons


@pytest.mark.slow
def test_each_cell_is_what_a_run_shows(tmp_path: Path) -> None:
    made = tmp_path / "options.md"
    command = [sys.executable, DOCS / "make_options.py", "--to", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert made.read_text() == PAGE.read_text(), "run: python docs/make_options.py"
