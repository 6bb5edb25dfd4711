"""Which trials of a database have changed since they were read.

All trials of a study exist from its beginning, most of them waiting, and workers read the trials
at each report. So a waiting trial is read once, and again when it no longer waits, or when a
command has given points to waiting trials.
"""

from collections.abc import Collection, Sequence

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from sweeps.compat import changed_trial_ids, id_of, study_attribute

POINTS_MARK = "points_mark"
"""User attribute of a study: another text whenever waiting trials were given points."""


class TrialReads:
    """What one process has read of the trials of a study.

    Args:
        database: the study's database.
        study_id: the storage's id of the study.
    """

    def __init__(self, database: RDBStorage, study_id: int) -> None:
        self._database = database
        self._study_id = study_id
        self._read_ids: set[int] = set()
        self.last_id = -1
        """The last id that was read; -1: none."""
        self._points_mark: str | None = None

    def changed_ids(self, unfinished: Collection[int]) -> list[int] | None:
        """Return the ids of the trials to read, in order; None: all that have not ended.

        Args:
            unfinished: the ids of the trials that had not ended when they were read.
        """
        mark = study_attribute(self._database, self._study_id, POINTS_MARK)
        # Before the first read, and where Optuna's cache has forgotten what was read.
        is_first = not self._read_ids or not unfinished
        if is_first or mark != self._points_mark:
            self._points_mark = mark
            return None
        first = min(unfinished)
        ids = changed_trial_ids(self._database, self._study_id, first, self.last_id)
        return [
            each for each in ids if each in unfinished or each not in self._read_ids
        ]

    def note(self, trials: Sequence[FrozenTrial]) -> None:
        """Note trials that were read."""
        ids = [id_of(trial) for trial in trials]
        self._read_ids.update(ids)
        self.last_id = max([self.last_id, *ids])
