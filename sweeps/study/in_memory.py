"""Studies that are in memory only: copies of others, and plain multiruns."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from sweeps.study.study import Study


def snapshot(study: Study) -> Study:
    """Copy a study's present state into memory, so that several reads agree."""
    return study_in_memory(
        study.folder,
        study.name,
        study.optuna.directions,
        study.optuna.user_attrs,
        study.trials(),
    )


def study_in_memory(
    folder: Path,
    name: str,
    directions: Sequence[StudyDirection],
    attributes: Mapping[str, Any],
    trials: Iterable[FrozenTrial],
) -> Study:
    """Create a study that is in memory only.

    Args:
        folder: the folder of its trials.
        name: its name.
        directions: one for each objective.
        attributes: its attributes, see `sweeps.study.study`.
        trials: its trials, by number.
    """
    storage = InMemoryStorage()
    study_id = storage.create_new_study(directions, name)
    for key, value in attributes.items():
        storage.set_study_user_attr(study_id, key, value)
    for trial in trials:
        storage.create_new_trial(study_id, trial)
    return Study(folder, name, storage)
