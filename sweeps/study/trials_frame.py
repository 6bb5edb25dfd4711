"""The trials of a study as a pandas frame."""

from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from sweeps.study.formatting import objective_values, parameter_names, trial_note
from sweeps.study.inside import point_of
from sweeps.study.study import Study

if TYPE_CHECKING:
    import pandas as pd


def trials_frame(study: Study) -> "pd.DataFrame":
    """Return a row for each trial; the columns are those of `sweeps.Study.trials_dataframe`."""
    import pandas as pd

    trials = study.trials()
    parameters = parameter_names(trials)
    columns = [
        *("number", "state", *study.objectives),
        *(f"params_{name}" for name in parameters),
        *("note", "datetime_start", "datetime_complete", "duration"),
    ]
    rows = [_row(study, trial) for trial in trials]
    return pd.DataFrame(rows, columns=columns)


def _row(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return the cells that a trial has, by their columns."""
    row: dict[str, Any] = {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "note": trial_note(trial),
        "datetime_start": trial.datetime_start,
        "datetime_complete": trial.datetime_complete,
        "duration": trial.duration,
    }
    # A trial without a value has none for each objective.
    row.update(zip(study.objectives, objective_values(trial), strict=False))
    for name, value in point_of(trial).items():
        row[f"params_{name}"] = value
    return row
