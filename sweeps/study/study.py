"""A study that exists: its folder, its storage, its attributes, and its trials.

The storage's study attributes hold what all workers and later sessions have to agree on:
`uid` (W&B run ids begin with it), `terms` (the config that makes trials comparable), `total`
(the number of trials, without those that a user adds by hand), `max_tokens` (their budget),
`engine`, `slots` and `checkpointing` (see `EngineChoice`), `sampler` (that of the last session),
`ended` (why the study has ended itself), and `points_mark` (see `sweeps.study.trial_reads`).
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.engine.interrupt import Interrupt
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from sweeps.compat import database_of
from sweeps.space.feasibility import is_feasible
from sweeps.study.errors import StorageLost
from sweeps.study.leases import open_leases
from sweeps.study.one_host import Hold
from sweeps.study.roles import ADDED, role
from sweeps.study.storage import open_storage, resolve_address
from sweeps.study.trial_reads import POINTS_MARK

# Optuna's own lines on each trial would repeat those of the study.
optuna.logging.set_verbosity(optuna.logging.WARNING)

OUT_OF_TIME = "out of time"
"""The `reason` attribute of a trial that was pruned when the session's time was over."""

ANSWER = "answer.json"
"""The winner, the baseline, and their losses on the test rows, in the study's folder."""

CONFIRMATION = "confirm.json"
"""The results of training the best trials again with other seeds, in the study's folder."""

TRIALS = "trials"
"""Folder of the trials' run folders, in the study's folder."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Study:
    """A study that exists: its Optuna study and its folder.

    Args:
        folder: the study's folder.
        name: the study's name in the storage.
        address: the database's address, or the storage itself; None: the journal in the folder.
        retry_seconds: seconds for which a lost connection is retried; None: the default.
        lost_after: seconds without a heartbeat after which the trials of this process may be
            taken by others; None: the default.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        address: str | BaseStorage | None,
        retry_seconds: float | None = None,
        lost_after: float | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.is_shared = isinstance(address, str)
        """Whether the trials are in a database, beside which there may be several folders."""
        self.without_adapter: set[int] = set()
        """The finished trials whose adapters this process has removed."""
        self.storage_error: StorageLost | None = None
        """Set once the database stays out of reach: this worker claims no further trial."""
        self.hold: Hold | None = None
        """This host's right to write to an SQLite file, while a session lives."""
        if isinstance(address, BaseStorage):
            self.storage = address
        else:
            self.storage = open_storage(address, folder, retry_seconds)
        self.leases = open_leases(self.storage, folder, lost_after)
        """The leases of its trials; None: no other machine can take part."""
        self.optuna = optuna.load_study(study_name=name, storage=self.storage)
        self._study_id = self.storage.get_study_id_from_name(name)

    @classmethod
    def load(cls, folder: Path, retry_seconds: float | None = None) -> "Study":
        """Load a study from its folder, to read it.

        Args:
            folder: the study's folder.
            retry_seconds: seconds for which a lost connection is retried; None: the default.

        Raises:
            ConfigError: there is no study, or its database can't be opened.
        """
        entry = read_json(folder / "study.json")
        if entry is None:
            raise ConfigError(f"{folder}: is no study folder: it has no study.json")
        address = resolve_address(entry["storage"])
        try:
            return cls(folder, entry["name"], address, retry_seconds)
        except KeyError:
            raise ConfigError(
                f"{folder}: its storage knows no study {entry['name']}"
            ) from None

    @property
    def uid(self) -> str:
        """A random id of the study; the W&B run ids of its trials begin with it."""
        return str(self.optuna.user_attrs["uid"])

    @property
    def total(self) -> int | None:
        """The number of trials that the study shall hold; None: as many as the budget allows.

        Those that a user has added by hand are included.
        """
        planned = self.planned_total
        return None if planned is None else planned + self.added_count

    @property
    def planned_total(self) -> int | None:
        """The number of trials without those that a user has added by hand; None: see `total`."""
        attributes = self.optuna.user_attrs
        if "total" in attributes:
            planned: int | None = attributes["total"]
            return planned
        # Studies from before it was stored have all their trials.
        return len(self.trials()) - self.added_count

    @property
    def added_count(self) -> int:
        """The number of trials that a user has added by hand."""
        return sum(role(trial) == ADDED for trial in self.trials())

    @property
    def max_tokens(self) -> int | None:
        """The training tokens of all trials from which on none begins; None: no limit."""
        max_tokens: int | None = self.optuna.user_attrs.get("max_tokens")
        return max_tokens

    @property
    def lock_path(self) -> Path:
        """The file lock under which trials are added and claimed on this machine."""
        return self.folder / ".lock"

    @property
    def objectives(self) -> list[str]:
        """The names of the metrics that the study optimizes."""
        names = self.optuna.user_attrs["terms"]["objective"]
        return [names] if isinstance(names, str) else list(names)

    @property
    def variants(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The values of each variant, by the name of the parameter and that of the variant."""
        variants = {}
        for key, term in self.optuna.user_attrs["terms"].items():
            if key.startswith("space.") and "variants" in term:
                variants[key.removeprefix("space.")] = term["variants"]
        return variants

    @property
    def sampler(self) -> Mapping[str, Any] | None:
        """The sampler and its arguments; None: an earlier version has stored none."""
        return self.optuna.user_attrs.get("sampler")

    @property
    def ended(self) -> str | None:
        """Why the study has ended itself, by `hydra.sweeper.stop_when`; None: it has not."""
        return self.optuna.user_attrs.get("ended")

    def end(self, reason: str) -> None:
        """End the study before it has all its trials: no further one begins, on any machine."""
        begun = len(self.trials()) - len(self.trials(TrialState.WAITING))
        of_total = "" if self.total is None else f" of {self.total}"
        trials = f"{begun}{of_total} {'trial' if begun == 1 else 'trials'}"
        note = f"the study ended itself after {trials}: {reason}"
        self.optuna.set_user_attr(
            "ended", f"{note}; hydra.sweeper.stop_when=null goes on"
        )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return all trials, or those in some states, by number. They are not copies."""
        # Optuna copies each trial with all its values unless it is told not to, and workers,
        # tables and reports read the trials again and again.
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that are complete, pruned or failed, by number."""
        return self.trials(*FINISHED)

    def ranked(self) -> list[FrozenTrial]:
        """Return the complete trials that violate no constraint, the best first.

        With several objectives, the Pareto front comes first, then the others, each by number.
        """
        complete = list(filter(is_feasible, self.trials(TrialState.COMPLETE)))
        if len(self.optuna.directions) == 1:
            return sorted(complete, key=self._cost_and_number)
        front = {trial.number for trial in self.optuna.best_trials}

        def front_first(trial: FrozenTrial) -> tuple[bool, int]:
            return trial.number not in front, trial.number

        return sorted(complete, key=front_first)

    def _cost_and_number(self, trial: FrozenTrial) -> tuple[float, int]:
        """Return the sort key of a complete trial; equal ones are ranked by number."""
        return self.to_cost(trial.value or 0.0), trial.number

    def to_cost(self, value: float) -> float:
        """Convert a value of the study's one objective, so that less is better."""
        if self.optuna.direction == StudyDirection.MAXIMIZE:
            return -value
        return value

    def baseline(self) -> FrozenTrial | None:
        """Return the trial of the config's own values, if it is complete."""
        for trial in self.trials(TrialState.COMPLETE):
            if role(trial) == "baseline":
                return trial
        return None

    def add_trial(self, trial: FrozenTrial) -> int:
        """Add a trial, and return the number that the storage has given it."""
        trial_id = self.storage.create_new_trial(self._study_id, trial)
        return self.storage.get_trial_number_from_id(trial_id)

    def add_waiting_trials(self, numbers: range) -> None:
        """Add waiting trials without points; `numbers` follow those of the study's trials."""
        database = database_of(self.storage)
        if database is not None:
            database.add_waiting_trials(self._study_id, numbers)  # type: ignore[attr-defined]
            return
        for number in numbers:
            trial = create_trial(state=TrialState.WAITING)
            trial.number = number
            self.optuna.add_trial(trial)

    def announce_points(self) -> None:
        """Let all workers read the waiting trials again, whose points have just been changed."""
        self.optuna.set_user_attr(POINTS_MARK, uuid.uuid4().hex)

    def trial_id(self, number: int) -> int:
        """Return the id under which the storage knows a trial; it may differ from its number."""
        return self.storage.get_trial_id_from_study_id_trial_number(
            self._study_id, number
        )

    def folder_of(self, number: int) -> RunFolder:
        """Return a trial's run folder."""
        return RunFolder(self.folder / TRIALS / str(number))

    def baseline_seed_folder(self, seed: int) -> RunFolder:
        """Return the run folder of the baseline with a further seed."""
        return RunFolder(self.folder / "baseline" / f"seed{seed}")

    def baseline_seed_folders(self) -> list[RunFolder]:
        """Return the run folders of the baseline's further seeds that were begun."""
        paths = sorted((self.folder / "baseline").glob("seed*"))
        return [RunFolder(path) for path in paths]

    def request_stop(self, number: int) -> None:
        """Ask the worker of a running trial to end it at its next step, as pruned."""
        self.storage.set_trial_user_attr(self.trial_id(number), "stop", True)

    def release_trials(self, error: StorageLost, interrupt: Interrupt) -> None:
        """End this worker's trials after their present step, with a checkpoint, and claim no more.

        They stay running in the storage, and a later worker adopts them.

        Args:
            error: why the storage is lost.
            interrupt: the interrupt that this worker's trials share.
        """
        self.storage_error = error
        interrupt.requested = True
