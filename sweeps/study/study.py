"""A study that exists: its folder, its storage, its attributes, and its trials.

The storage's study attributes hold what all workers and later sessions have to agree on:
`uid` (W&B run ids begin with it), `terms` (the config that makes trials comparable), `total`
(the number of trials), and `engine`, `slots` and `checkpointing` (see `EngineChoice`).
"""

import copy
import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from finetune.config.secrets import refuse_secrets_in
from finetune.engine.interrupt import Interrupt
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import read_json, write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import FolderHeld, RunFolder
from sweeps.space.settings import StudySettings
from sweeps.study.errors import KEY, StorageLost
from sweeps.study.storage import open_storage
from sweeps.study.terms import has_new_config, require_changeable, require_same_terms

log = logging.getLogger(__name__)

# Optuna's own lines on each trial would repeat those of the study.
optuna.logging.set_verbosity(optuna.logging.WARNING)

OUT_OF_TIME = "out of time"
"""The `reason` attribute of a trial that was pruned when the session's time was over."""

CONFIRMATION = "confirm.json"
"""The results of training the best trials again with other seeds, in the study's folder."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class EngineChoice:
    """How all trials of a study are trained, decided once, when the study begins."""

    name: str
    """`packed` or `trl`."""
    slots: int
    """Number of trials that train together on one worker."""
    checkpointing: bool = False
    """The value of `trainer.gradient_checkpointing` where the config leaves it to `auto`."""


class Study:
    """A study that exists: its Optuna study and its folder.

    Args:
        folder: the study's folder.
        name: the study's name in the storage.
        address: the database's address; None: the journal in the folder.
        patience: seconds for which a lost connection is retried; None: the default.
    """

    def __init__(
        self, folder: Path, name: str, address: str | None, patience: float | None = None
    ) -> None:
        self.folder = folder
        self.name = name
        self.is_shared = address is not None
        """Whether workers on other machines, with folders of their own, may take part."""
        self.storage_error: StorageLost | None = None
        """Set once the database stays out of reach: this worker claims no further trial."""
        self.storage = open_storage(address, folder, patience)
        self.optuna = optuna.load_study(study_name=name, storage=self.storage)
        self._study_id = self.storage.get_study_id_from_name(name)

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: StudySettings,
        address: str | None,
        terms: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> "Study":
        """Begin a study, or resume it.

        Args:
            folder: the study's folder; made if missing.
            settings: the study's settings.
            address: the database's address; None: a journal in the folder.
            terms: what makes trials comparable, see `sweeps.study.terms`.
            distributions: the searched parameters.

        Raises:
            ConfigError: the study began on other terms, or its storage can't be opened.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock"):
            optuna.create_study(
                study_name=settings.study_name,
                storage=open_storage(address, folder),
                directions=settings.directions,
                load_if_exists=True,
            )
            study = cls(folder, settings.study_name, address)
            study._ensure_uid()
            study._update_terms(terms, distributions, settings.allow_change)
            entry = {"name": settings.study_name, "storage": settings.storage}
            write_json(folder / "study.json", entry)
        return study

    @classmethod
    def load(cls, folder: Path, patience: float | None = None) -> "Study":
        """Load a study from its folder, to read it.

        Args:
            folder: the study's folder.
            patience: seconds for which a lost connection is retried; None: the default.

        Raises:
            ConfigError: there is no study, or its database can't be opened.
        """
        entry = read_json(folder / "study.json")
        if entry is None:
            raise ConfigError(f"{folder}: is no study folder: it has no study.json")
        # Resolves references to secrets in environment variables.
        resolved = OmegaConf.create({"storage": entry["storage"]})
        try:
            return cls(folder, entry["name"], resolved.storage, patience)
        except KeyError:
            raise ConfigError(f"{folder}: its storage knows no study {entry['name']}") from None

    def _ensure_uid(self) -> None:
        """Give a new study its uid; refuse the folder of another study."""
        if "uid" in self.optuna.user_attrs:
            return
        if (self.folder / "trials").exists():
            reason = (
                f"another study's trials are in {self.folder}, and this storage has no such study"
            )
            raise refusal("hydra.sweeper.study_name", self.name, f"{reason}; give another name")
        self.optuna.set_user_attr("uid", uuid.uuid4().hex[:8])

    def _update_terms(
        self,
        terms: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        allow_change: bool,
    ) -> None:
        """Compare the terms with those the study began with, and store those that hold now."""
        stored = self.optuna.user_attrs.get("terms")
        if stored is not None:
            if not allow_change:
                require_same_terms(self.name, stored, json.loads(json.dumps(terms)))
            require_changeable(self.name, stored, terms, self.trials(), distributions)
            if has_new_config(stored, terms):
                self._clear_unfinished_runs()
        if stored != terms:
            self.optuna.set_user_attr("terms", terms)

    def _clear_unfinished_runs(self) -> None:
        """Empty the folders of running trials without a worker: their config is another now."""
        for trial in self.trials(TrialState.RUNNING):
            folder = self.folder_of(trial.number)
            if not folder.path.exists():
                continue
            try:
                with folder.locked():
                    result = read_json(folder.result) or {}
                    if result.get("status") not in ("completed", "pruned", "failed"):
                        folder.clear()
            except FolderHeld:  # a worker trains it
                continue

    def decide_engine(self, choice: EngineChoice) -> EngineChoice:
        """Store how trials are trained, unless an earlier session did; return the stored choice."""
        if "engine" not in self.optuna.user_attrs:
            self.optuna.set_user_attr("slots", choice.slots)
            self.optuna.set_user_attr("checkpointing", choice.checkpointing)
            # Last, because its presence says that all three are stored.
            self.optuna.set_user_attr("engine", choice.name)
        stored = self.optuna.user_attrs
        return EngineChoice(
            name=str(stored["engine"]),
            slots=int(stored["slots"]),
            checkpointing=bool(stored.get("checkpointing", False)),
        )

    @property
    def uid(self) -> str:
        """A random id of the study; the W&B run ids of its trials begin with it."""
        return str(self.optuna.user_attrs["uid"])

    @property
    def lock_path(self) -> Path:
        """The file lock under which trials are added and claimed on this machine."""
        return self.folder / ".lock"

    @property
    def written_address(self) -> str | None:
        """The database's address as the user wrote it, without secrets; None: the journal."""
        address: str | None = read_json(self.folder / "study.json")["storage"]
        if address is None:
            return None
        try:
            refuse_secrets_in(f"{KEY}={address}")
        except ConfigError:  # an earlier version accepted a password in the address
            return "${oc.env:STUDY_DATABASE}"
        return address

    @property
    def objectives(self) -> list[str]:
        """The names of the metrics that the study optimizes."""
        names = self.optuna.user_attrs["terms"]["objective"]
        return [names] if isinstance(names, str) else list(names)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return all trials, or those in some states, by number. They are not copies."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that are complete, pruned or failed, by number."""
        return self.trials(*FINISHED)

    def ranked(self) -> list[FrozenTrial]:
        """Return the complete trials, the best first.

        With several objectives, the Pareto front comes first, then the others, each by number.
        """
        complete = self.trials(TrialState.COMPLETE)
        if len(self.optuna.directions) == 1:
            return sorted(complete, key=lambda trial: (self.cost(trial.value or 0.0), trial.number))
        front = {trial.number for trial in self.optuna.best_trials}
        return sorted(complete, key=lambda trial: (trial.number not in front, trial.number))

    def cost(self, value: float) -> float:
        """Return a value of the study's one objective, negated if larger values are better."""
        return value if self.optuna.direction == StudyDirection.MINIMIZE else -value

    def baseline(self) -> FrozenTrial | None:
        """Return the trial of the config's own values, if it is complete."""
        for trial in self.trials(TrialState.COMPLETE):
            if role(trial) == "baseline":
                return trial
        return None

    def trial_id(self, number: int) -> int:
        """Return the id under which the storage knows a trial; it may differ from its number."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def folder_of(self, number: int) -> RunFolder:
        """Return a trial's run folder."""
        return RunFolder(self.folder / "trials" / str(number))

    def request_stop(self, number: int) -> None:
        """Ask the worker of a running trial to end it at its next step, as pruned."""
        self.storage.set_trial_user_attr(self.trial_id(number), "stop", True)

    def snapshot(self) -> "Study":
        """Copy the study's present state into memory, so that several reads agree."""
        storage = InMemoryStorage()
        study_id = storage.create_new_study(self.optuna.directions, self.name)
        for name, value in self.optuna.user_attrs.items():
            storage.set_study_user_attr(study_id, name, value)
        for trial in self.trials():
            storage.create_new_trial(study_id, trial)
        snapshot = copy.copy(self)
        snapshot.storage = storage
        snapshot.optuna = optuna.load_study(study_name=self.name, storage=storage)
        snapshot._study_id = study_id  # noqa: SLF001  (an attribute of its own class)
        return snapshot

    def release_trials(self, error: StorageLost, interrupt: Interrupt) -> None:
        """End this worker's trials after their present step, with a checkpoint, and claim no more.

        They stay running in the storage, and a later worker adopts them.

        Args:
            error: why the storage is lost.
            interrupt: the interrupt that this worker's trials share.
        """
        self.storage_error = error
        interrupt.requested = True

    def remove_adapters(self, keep: int) -> None:
        """Remove adapters and checkpoints of finished trials that nobody needs any more.

        Those of the baseline and of the winner that a confirmation has chosen stay.

        Args:
            keep: number of the best trials whose adapters and checkpoints stay.
        """
        # Read before the ranking: a trial that finishes in between may be one of the best.
        finished = self.finished()
        needed = {trial.number for trial in self.ranked()[:keep]}
        baseline = self.baseline()
        if baseline is not None:
            needed.add(baseline.number)
        confirmation = read_json(self.folder / CONFIRMATION)
        if confirmation:
            needed.add(confirmation["winner"])
        for trial in finished:
            if trial.number not in needed:
                folder = self.folder_of(trial.number)
                shutil.rmtree(folder.adapter, ignore_errors=True)
                shutil.rmtree(folder.checkpoints, ignore_errors=True)


def role(trial: FrozenTrial | optuna.Trial) -> str:
    """Return where a trial's values come from: baseline, start, grid; empty: the sampler."""
    return str(trial.user_attrs.get("role", ""))
