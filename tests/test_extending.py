"""The examples of docs/extending.md work with the code as it is."""

import re
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from optuna.trial import TrialState

import finetune.data.formats as formats
import sweeps.space.pruners as pruners
from finetune.files.run_folder import RunFolder
from finetune.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


def example(text: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the page's Python example that contains a text, and return its names."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (code,) = [block for block in blocks if text in block]
    names = dict(namespace)
    exec(code, names)
    return names


def test_the_tracker_overrides_hooks_and_writes_its_file(tmp_path: Path) -> None:
    tracker_class = example("class CsvTracker", {})["CsvTracker"]
    methods = {name for name in vars(tracker_class) if not name.startswith("_")}
    assert issubclass(tracker_class, Tracker)
    assert methods <= vars(Tracker).keys()
    tracker = tracker_class(RunFolder(tmp_path))
    tracker.log(1, {"train/loss": 2.5})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["1,train/loss,2.5"]
    (location,) = tracker.locations()
    assert "metrics.csv" in location


def test_the_pruner_prunes_what_is_worse_by_more_than_the_gap() -> None:
    pruner = example("class GapPruner", vars(pruners))["GapPruner"](gap=0.1)
    study = optuna.create_study(pruner=pruner)
    for value in (2.0, 2.05, 2.5):
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, intermediate_values={1: value}
            )
        )
    trials = study.get_trials()
    assert [pruner.prune(study, trial) for trial in trials] == [False, False, True]


def test_the_format_converts_a_row() -> None:
    convert = example("def _squad", vars(formats))["_squad"]
    row = {"context": "A box.", "question": "What?", "answers": {"text": ["a box"]}}
    columns = {"prompt": "question", "input": "context", "completion": "answers"}
    content = convert(formats.Cells(row, columns, "row 1"))
    assert content["messages"][0]["content"] == "A box.\n\nWhat?"
    assert content["messages"][-1]["content"] == "a box"


def test_the_search_space_suggests_dropout_for_large_ranks_only() -> None:
    extend = example("def dropout_for_large_ranks", {})["dropout_for_large_ranks"]
    study = optuna.create_study()
    for rank in (8, 32):
        study.enqueue_trial({"lora.r": rank})
        trial = study.ask()
        trial.suggest_categorical("lora.r", [8, 32])
        extend(OmegaConf.create(), trial)
        assert ("lora.dropout" in trial.params) == (rank == 32)
