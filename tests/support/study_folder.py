"""Reading a study's folder, and Python that makes the processes of a study fail."""

import json
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from sweeps.study.study import FINISHED, Study

NO_END = ("trainer.max_steps=100000", "trainer.eval_steps=0", "trainer.save_steps=5")
"""Overrides of a trial that trains until it is stopped."""


def folder_of(place: Path, name: str = "s") -> Path:
    """Return the folder of a study that was started in a directory."""
    return place / "outputs" / "sweeps" / name


def trials_of(place: Path, *states: TrialState) -> list[FrozenTrial]:
    return Study.load(folder_of(place)).trials(*states)


def result_of(place: Path, number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (folder_of(place) / "trials" / str(number) / "result.json").read_text()
    )
    return content


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        trial.number,
        trial.state,
        trial.params,
        trial.values,
        trial.intermediate_values,
    )


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def require_params_agree(place: Path) -> None:
    """Check that storage, overrides and config of each finished trial have the same parameters."""
    for trial in trials_of(place, *FINISHED):
        folder = folder_of(place) / "trials" / str(trial.number)
        if trial.state == TrialState.FAIL and not (folder / "run.json").exists():
            continue  # killed each time before its run began
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        given = dict(line.split("=", 1) for line in overrides)
        config = json.loads((folder / "run.json").read_text())["config"]
        for name, value in trial.params.items():
            section, key = name.split(".")
            assert float(given[name]) == config[section][key] == value


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in rows
    ]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


DIES = """
import os
from finetune.engine.packed.bank import Bank
Bank.forward_backward = lambda *_: os.kill(os.getpid(), 9)
"""
"""The first batch kills the process."""
SMALL_MEMORY = """
import torch
from finetune.engine.packed.bank import Bank
from finetune.engine.trl.training import TrlTraining
learn, train = Bank.forward_backward, TrlTraining.train
def fits(rows):
    if rows > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
def small_learn(self, wishes):
    fits(max(len(wish.rows) for wish in wishes))
    return learn(self, wishes)
def small_train(self, *rest):
    fits(self._config.trainer.per_device_train_batch_size)
    return train(self, *rest)
Bank.forward_backward, TrlTraining.train = small_learn, small_train
"""
"""Batches of two rows fit into memory, larger ones do not."""

LOST = "lost its worker 3 times without a new checkpoint"
