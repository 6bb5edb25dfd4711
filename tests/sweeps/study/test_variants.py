"""A study whose space, a file, has variants and a condition: in slots, in processes, and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.study_folder import folder_of

from finetune.files.atomic import read_json
from sweeps.study.formatting import trials_table
from sweeps.study.study import Study

pytestmark = pytest.mark.slow

SPACE = """
params:
  size:
    variants:
      tiny: {lora.r: 2, lora.alpha: 4}
      small: [lora.r=4, lora.alpha=16]
      large: {lora: r8, lora.alpha: "${lora.r}"}
  optimizer.lr_scheduler_type: choice(linear,constant)
  optimizer.warmup_ratio: {search: "interval(0.1, 0.5)", when: {optimizer.lr_scheduler_type: linear}}
"""
VALUES = {"tiny": (2, 4), "small": (4, 16), "large": (8, 8)}


def search(station: Station, tiny_base: Path, cwd: Path, *more: str) -> Any:
    return station.run(
        *study_overrides(tiny_base, "s"),
        "--config-dir",
        ".",
        "search=mine",
        "hydra/sweeper/pruner=none",
        *more,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    "more",
    [["hydra.sweeper.slots=2"], ["hydra.sweeper.n_jobs=2"]],
    ids=["slots", "processes"],
)
def test_variants_and_conditions_reach_each_trials_config(
    more: list[str], station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "search").mkdir()
    space = tmp_path / "search" / "mine.yaml"
    space.write_text(SPACE)

    ended = search(station, tiny_base, tmp_path, "hydra.sweeper.n_trials=6", *more)

    assert ended.returncode == 0, ended.stderr
    study = Study.load(folder_of(tmp_path))
    trials = study.trials(TrialState.COMPLETE)
    assert len(trials) == 6
    for trial in trials:
        config = read_json(study.folder_of(trial.number).identity)["config"]
        lora, optimizer = config["lora"], config["optimizer"]
        if trial.number == 0:
            assert (lora["r"], lora["alpha"]) == (16, 16)
            assert "size" not in trial.params
            continue
        assert (lora["r"], lora["alpha"]) == VALUES[trial.params["size"]]
        is_linear = trial.params["optimizer.lr_scheduler_type"] == "linear"
        assert optimizer["lr_scheduler_type"] == ("linear" if is_linear else "constant")
        # Without the condition's value, the config's own: 0.05.
        rate = trial.params["optimizer.warmup_ratio"] if is_linear else 0.05
        assert optimizer["warmup_ratio"] == rate
    for text in (ended.stderr, trials_table(study)):
        assert "size=small: lora.r=4 lora.alpha=16" in text
    answer = json.loads((study.folder / "answer.json").read_text())
    assert answer["params"].keys() & {"size", "lora.r"}

    # The same space goes on; a variant that means something else does not, whatever is allowed.
    again = search(station, tiny_base, tmp_path, "hydra.sweeper.n_trials=6", *more)
    assert again.returncode == 0, again.stderr
    assert "study s is full (6 trials)" in again.stderr
    space.write_text(SPACE.replace("lora.alpha=16", "lora.alpha=32"))
    changed = search(station, tiny_base, tmp_path)
    assert changed.returncode == 1
    assert changed.stderr.splitlines()[-1].startswith("error: size={")
    allowed = search(station, tiny_base, tmp_path, "hydra.sweeper.allow_change=true")
    assert allowed.stderr.splitlines()[-1] == (
        "error: size: study s has trials of other variants; "
        "give another hydra.sweeper.study_name"
    )
