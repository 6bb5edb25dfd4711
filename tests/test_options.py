"""docs/options.md: each option with both engines and each quantization, as it is."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest
from support.matrix import further
from support.scripts import load_script

from finetune.config.sections.lora import CHOOSES_MATRICES, LoraSettings
from finetune.config.sections.model import ModelSettings
from finetune.config.sections.optimizer import OptimizerName, ScheduleName
from finetune.config.sections.trainer import KEEPS_BASE, TrainerSettings

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "options.md"

WITHOUT_ROW = {
    # Which base it is, in docs/models.md, and texts and rates.
    "model.name_or_path", "model.revision", "model.trust_remote_code", "model.chat_template",
    "model.template_kwargs", "model.learning_rate",
    # Numbers that each engine has.
    "lora.r", "lora.alpha", "trainer.num_train_epochs", "trainer.max_steps",
    "trainer.per_device_train_batch_size", "trainer.per_device_eval_batch_size",
    "trainer.eval_steps", "trainer.save_steps", "trainer.save_minutes", "trainer.logging_steps",
    # The columns, and what only several GPUs show.
    "trainer.engine", "trainer.gpus",
}  # fmt: skip
"""Keys that train with each engine and quantization, or that no run on a CPU can tell of."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(DOCS / "make_options.py")


def table() -> dict[str, list[str]]:
    """The cells of each option of the page's table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    found = {}
    for line in lines[1:]:
        option, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
        found[option] = cells
    return found


def rows() -> list[str]:
    """The options of the page's table."""
    return list(table())


def test_the_page_has_all_options_of_the_script(script: ModuleType) -> None:
    assert rows() == list(script.options(Path("FOLDER"), Path("EXPERTS")))


def test_the_page_has_every_key_of_model_adapter_and_training() -> None:
    keys = {
        f"{settings.section}.{field.name}"
        for settings in (ModelSettings, LoraSettings, TrainerSettings)
        for field in dataclasses.fields(settings)
    }
    with_row = {key for key in keys if any(has_key(row, key) for row in rows())}
    assert keys - with_row == WITHOUT_ROW


def has_key(row: str, key: str) -> bool:
    """Whether a row of the table sets a key, or one below it."""
    return any(word.startswith((f"{key}=", f"{key}.")) for word in row.split())


def test_the_page_has_every_optimizer_schedule_and_supported_argument() -> None:
    page = " ".join(rows())
    for optimizer in typing.get_args(OptimizerName):
        assert f"optimizer.name={optimizer}" in rows()
    for schedule in typing.get_args(ScheduleName):
        assert f"optimizer.lr_scheduler_type={schedule}" in rows()
    for argument in CHOOSES_MATRICES | {"target_parameters"}:
        assert f"lora.extra.{argument}" in page
    # lr_scheduler_kwargs are those of two schedules; the number of checkpoints changes no run.
    for argument in KEEPS_BASE - {"lr_scheduler_kwargs", "save_total_limit"}:
        assert f"trainer.extra.{argument}" in page


def test_every_reason_is_used_and_every_number_has_one() -> None:
    cells = {cell for row in table().values() for cell in row}
    used = cells - {"yes"}
    lines = PAGE.read_text().splitlines()
    reasons = {line.partition(". ")[0] for line in lines if line[:1].isdigit()}
    assert used == reasons


def page_with(quantizations: list[str]) -> str:
    """The page without the columns of other quantizations."""
    lines = PAGE.read_text().splitlines(keepends=True)
    header = next(line for line in lines if line.startswith("|")).split("|")
    columns = [
        number
        for number, name in enumerate(header)
        if set(name.split()[1:]) <= set(quantizations)
    ]
    return "".join(
        "|".join(line.split("|")[number] for number in columns)
        if line.startswith("|")
        else line
        for line in lines
    )


def test_each_quantization_in_4_bits_has_the_same_cells() -> None:
    for cells in table().values():
        for nf4, nf4_double, fp4 in (cells[1:4], cells[6:9]):
            assert nf4 == nf4_double == fp4


def test_optimizers_have_the_same_cell_with_each_quantization() -> None:
    """So that one of them is enough for most tests."""
    for option, cells in table().items():
        if option.startswith("optimizer."):
            assert len({*cells[:5]}) == len({*cells[5:]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizations", "arguments"),
    [
        # bitsandbytes computes the other two by the same code, with another table of values.
        (["none", "nf4_double", "int8"], ["--optimizers-once"]),
        *further((["none", "nf4", "nf4_double", "fp4", "int8"], [])),
    ],
)
def test_each_cell_is_what_a_run_shows(
    quantizations: list[str], arguments: list[str], tmp_path: Path
) -> None:
    made = tmp_path / "options.md"
    command = [sys.executable, DOCS / "make_options.py", "--to", made]
    command += ["--quantizations", ",".join(quantizations), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert made.read_text() == page_with(quantizations), (
        "run: python docs/make_options.py"
    )
