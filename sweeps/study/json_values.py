"""Studies and trials as plain values, as `--json` prints them: see docs/json.md."""

import os
import time
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from sweeps.space.feasibility import is_feasible
from sweeps.study.budget import trained_tokens
from sweeps.study.find_study import begun
from sweeps.study.formatting import objective_values, trial_note
from sweeps.study.inside import is_inside, point_of
from sweeps.study.roles import role
from sweeps.study.study import Study
from sweeps.study.trial_text import differences, find_trial


def study_value(study: Study) -> dict[str, Any]:
    """Return a study: its name, folder and start, how many trials it has, and the best one."""
    trials = study.trials()
    ranked = study.ranked()
    start = time.localtime(begun(study.folder))
    return {
        "study": study.name,
        "folder": os.path.relpath(study.folder),
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z", start),
        "objectives": study.objectives,
        "finished": len(study.finished()),
        "waiting": sum(trial.state == TrialState.WAITING for trial in trials),
        "trials": len(trials),
        "best": trial_value(study, ranked[0]) if ranked else None,
        "ended": study.ended or None,
        "train_tokens": trained_tokens(study),
        "max_tokens": study.max_tokens,
        "error": None,
    }


def trial_value(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial: its state, its objectives, and its point."""
    # A trial without a value has none for each objective.
    values = zip(study.objectives, objective_values(trial), strict=False)
    objectives: dict[str, float | None] = dict.fromkeys(study.objectives)
    objectives |= dict(values)
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "objectives": objectives,
        "params": point_of(trial),
        "role": role(trial) or None,
        "inside": is_inside(trial),
        "feasible": is_feasible(trial),
        "note": trial_note(trial) or None,
        "folder": os.path.relpath(study.folder_of(trial.number).path),
    }


def trials_value(study: Study) -> dict[str, Any]:
    """Return a study with all its trials, by their numbers."""
    trials = [trial_value(study, trial) for trial in study.trials()]
    return {**study_value(study), "trials": trials}


def full_trial_value(study: Study, number: int) -> dict[str, Any]:
    """Return a trial with the content of its `result.json`, null where it has none yet.

    Raises:
        ConfigError: the study has no such trial.
    """
    trial = trial_value(study, find_trial(study, number))
    result = read_json(study.folder_of(number).result)
    return {"study": study.name, **trial, "result": result}


def difference_value(study: Study, numbers: Sequence[int]) -> dict[str, Any]:
    """Return what trials differ in: the value of each by the key, null where it has none.

    Raises:
        ConfigError: see `differences`.
    """
    values = {
        name: [None if value == "" else value for value in row]
        for name, row in differences(study, numbers, formatted=False).items()
    }
    return {"study": study.name, "trials": list(numbers), "differences": values}
