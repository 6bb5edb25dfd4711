"""One study: its folder and storage, what it holds its trials to, and which worker takes which trial.

Trials are written down as waiting when a study begins, exactly as many as it shall hold; a worker claims one at
a time. Whoever claims a trial holds its folder's lock as long as the process lives: a running trial whose
folder is free has lost its worker, and is taken on under its own number.
"""

import contextlib
import copy
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.config.secrets import refuse_secrets_in
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import read_json, write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import FolderHeld, RunFolder
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, describe
from sweeps.study.errors import KEY, StorageLost
from sweeps.study.storage import open_storage

log = logging.getLogger(__name__)


optuna.logging.set_verbosity(optuna.logging.WARNING)  # what matters of it is said by the study itself


OUT_OF_TIME = "out of time"
"""Why a trial was pruned that ran when the session's time was over."""


CONFIRMATION = "confirm.json"
"""What training the best trials anew has shown, in the study's folder."""


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Claim:
    """A trial that this worker has taken, and its folder, locked."""

    number: int
    trial_id: int
    folder: RunFolder


class Study:
    """A study that exists: its Optuna study and its folder.

    What all its workers and later sessions must know is kept in the storage as the study's own attributes:
    `uid` (names its W&B runs), `terms` (what trials are held to, so that they can be compared).
    """

    def __init__(self, folder: Path, name: str, address: str | None, patience: float | None = None) -> None:
        self.folder, self.name, self._is_shared = folder, name, address is not None
        self.lost: StorageLost | None = None
        """Set when the database stays out of reach: no trial is claimed any more."""
        self.storage = open_storage(address, folder, patience)
        self.optuna = optuna.load_study(study_name=name, storage=self.storage)

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: StudySettings,
        address: str | None,
        terms: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> "Study":
        """Begin a study, or go on with it. Raises ConfigError where it began on other terms."""
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock"):
            optuna.create_study(
                study_name=settings.study_name,
                storage=open_storage(address, folder),
                directions=settings.directions,
                load_if_exists=True,
            )
            study = cls(folder, settings.study_name, address)
            study._agree(settings, terms, distributions)
            write_json(folder / "study.json", {"name": settings.study_name, "storage": settings.storage})
        return study

    @classmethod
    def load(cls, folder: Path, patience: float | None = None) -> "Study":
        """A study from its folder, to be looked at.

        Args:
            folder: the study's folder.
            patience: seconds for which a lost connection to its database is tried again; None: the usual time.

        Raises:
            ConfigError: there is none, or its database can't be opened.
        """
        from omegaconf import OmegaConf

        known = read_json(folder / "study.json")
        if known is None:
            raise ConfigError(f"{folder}: is no study folder: it has no study.json")
        address = OmegaConf.to_container(OmegaConf.create({"storage": known["storage"]}), resolve=True)
        assert isinstance(address, dict)
        try:
            return cls(folder, known["name"], address["storage"], patience)
        except KeyError:
            raise ConfigError(f"{folder}: its storage knows no study {known['name']}") from None

    def _agree(
        self, settings: StudySettings, terms: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        """Hold a study that exists to what it began with, unless told to take what changed."""
        known = self.optuna.user_attrs
        if "uid" not in known:
            if (self.folder / "trials").exists():
                another = f"another study's trials are in {self.folder}, which this storage does not know"
                raise refusal("hydra.sweeper.study_name", self.name, f"{another}; give another name")
            self.optuna.set_user_attr("uid", uuid.uuid4().hex[:8])
        began = known.get("terms")
        if began is not None:
            if not settings.allow_change:
                _require_same(self.name, began, json.loads(json.dumps(terms)))
            self._require_changeable(began, terms, distributions)
            if any(terms.get(key) != value for key, value in began.items() if not key.startswith("space.")):
                self._begin_anew()
        if began != terms:
            self.optuna.set_user_attr("terms", terms)

    def _require_changeable(
        self, began: Mapping[str, Any], terms: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        """Refuse what no study can take: another measure, and for Optuna other choices under the same name."""
        another = "give another hydra.sweeper.study_name"
        for key in ("objective", "hydra.sweeper.direction"):
            if began.get(key) != terms.get(key):
                raise refusal(
                    key, terms.get(key), f"study {self.name} judges its trials by {began.get(key)}; {another}"
                )
        for trial in self.trials():
            for name in trial.distributions.keys() & distributions.keys():
                try:
                    check_distribution_compatibility(trial.distributions[name], distributions[name])
                except ValueError:
                    was, now = describe(trial.distributions[name]), describe(distributions[name])
                    raise refusal(
                        name, now, f"study {self.name} has trials of {was}, and choices can't change; {another}"
                    ) from None

    def _begin_anew(self) -> None:
        """What has lost its worker under another config can't go on from there."""
        for trial in self.trials(TrialState.RUNNING):
            folder = self.folder_of(trial.number)
            if folder.path.exists():
                with contextlib.suppress(FolderHeld), folder.locked():
                    if (read_json(folder.result) or {}).get("status") not in ("completed", "pruned", "failed"):
                        folder.clear()

    def settle(self, engine: str, slots: int, checkpointing: bool) -> tuple[str, int, bool]:
        """What all the study's trials have in common, decided when it began.

        The engine, how many train together, and whether activations are computed twice where the config leaves it open.
        """
        if "engine" not in self.optuna.user_attrs:
            self.optuna.set_user_attr("slots", slots)
            self.optuna.set_user_attr("checkpointing", checkpointing)
            self.optuna.set_user_attr("engine", engine)
        known = self.optuna.user_attrs
        return str(known["engine"]), int(known["slots"]), bool(known.get("checkpointing", False))

    @property
    def uid(self) -> str:
        """Random, the study's own: trials' W&B runs are named by it."""
        return str(self.optuna.user_attrs["uid"])

    @property
    def written_address(self) -> str | None:
        """The storage's address as the user wrote it, secrets by the names of their variables; None: the journal."""
        known: str | None = read_json(self.folder / "study.json")["storage"]
        if known is None:
            return None
        try:
            refuse_secrets_in(f"{KEY}={known}")
        except ConfigError:  # written by a version that let it pass
            return "${oc.env:STUDY_DATABASE}"
        return known

    @property
    def objectives(self) -> list[str]:
        """The names of the metrics that trials are judged by."""
        names = self.optuna.user_attrs["terms"]["objective"]
        return [names] if isinstance(names, str) else list(names)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in certain states, by number."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def finished(self) -> list[FrozenTrial]:
        """Trials that are complete, pruned or failed."""
        return self.trials(*FINISHED)

    def folder_of(self, number: int) -> RunFolder:
        """A trial's run folder."""
        return RunFolder(self.folder / "trials" / str(number))

    def snapshot(self) -> "Study":
        """The study as it is now, in memory: what is asked of it one after the other agrees, while workers go on."""
        taken, storage = copy.copy(self), optuna.storages.InMemoryStorage()
        number = storage.create_new_study(self.optuna.directions, self.name)
        for name, value in self.optuna.user_attrs.items():
            storage.set_study_user_attr(number, name, value)
        for trial in self.trials():
            storage.create_new_trial(number, trial)
        taken.storage, taken.optuna = storage, optuna.load_study(study_name=self.name, storage=storage)
        return taken

    def enlist(self, total: int, points: list[tuple[str, Point]]) -> int:
        """Write down waiting trials until the study holds so many; returns how many are still to be done.

        Points that no trial has been given yet go to the next that wait, each with the role (baseline, start,
        grid) that its trial keeps. There is one baseline, and once more where time was over before its end.
        """
        with file_lock(self.folder / ".lock"):
            self.optuna.set_user_attr("total", total)
            for number in range(len(self.trials()), total):
                trial = create_trial(state=TrialState.WAITING)
                trial.number = number  # a database adds none that it holds: another machine may add them just now
                self.optuna.add_trial(trial)
            trials = [trial for trial in self.trials() if trial.user_attrs.get("reason") != OUT_OF_TIME]
            given = [trial.system_attrs["fixed_params"] for trial in trials if "fixed_params" in trial.system_attrs]
            roles = {role(trial) for trial in trials}
            new: list[tuple[str, Point]] = []
            for why, point in points:
                if point not in [*given, *(other for _, other in new)] and not (why == "baseline" and why in roles):
                    new.append((why, point))
            free = [trial for trial in self.trials(TrialState.WAITING) if "fixed_params" not in trial.system_attrs]
            for trial, (why, point) in zip(free, new, strict=False):
                self.storage.set_trial_system_attr(trial._trial_id, "fixed_params", point)
                self.storage.set_trial_user_attr(trial._trial_id, "role", why)
            if len(new) > len(free):
                more = len(new) - len(free)
                log.info("%d points wait for a trial: hydra.sweeper.n_trials=%d takes them", more, total + more)
            return total - len(self.finished())

    @contextlib.contextmanager
    def claim(self, wanted: Callable[[FrozenTrial], bool] = lambda _: True) -> Iterator[Claim | None]:
        """Take the next wanted trial: one that has lost its worker, else the next that waits; None if there is none.

        The trial's folder is held while the context lasts.
        """
        with contextlib.ExitStack() as held:
            with file_lock(self.folder / ".lock"):
                claim = self._take(held, wanted)
            yield claim

    def _take(self, held: contextlib.ExitStack, wanted: Callable[[FrozenTrial], bool]) -> Claim | None:
        total = self.optuna.user_attrs.get("total", len(self.trials()))
        waiting = [trial for trial in self.trials(TrialState.WAITING) if trial.number < total]  # was it more once?
        for trial in filter(wanted, [*self.trials(TrialState.RUNNING), *waiting]):
            folder = self.folder_of(trial.number)
            if self._is_shared and trial.state == TrialState.RUNNING and not folder.path.exists():
                continue  # another machine's, whose folders are not here
            try:
                held.enter_context(folder.locked())
            except FolderHeld:
                continue
            if self._set_running(trial):
                return Claim(trial.number, trial._trial_id, folder)
            held.close()
            _discard(folder)
        return None

    def _set_running(self, trial: FrozenTrial) -> bool:
        """Whether the trial is this worker's: it ran and still does, or nobody else has taken it meanwhile."""
        if trial.state == TrialState.RUNNING:
            return self.storage.get_trial(trial._trial_id).state == TrialState.RUNNING
        try:
            return self.storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def orphans(self) -> list[int]:
        """Running trials that have lost their worker, by number."""
        lost = []
        with file_lock(self.folder / ".lock"):
            for trial in self.trials(TrialState.RUNNING):
                folder = self.folder_of(trial.number)
                if folder.path.exists():
                    with contextlib.suppress(FolderHeld), folder.locked():
                        lost.append(trial.number)
        return lost

    def tidy(self, keep: int) -> None:
        """Keep the adapters of so many best trials, of the baseline, and of the winner that a confirmation has found.

        The others' go, with their checkpoints.
        """
        finished, baseline = self.finished(), self.baseline()  # one that ends from here on may be among the best
        kept = {trial.number for trial in [*self.ranked()[:keep], *([baseline] if baseline else [])]}
        confirmed = read_json(self.folder / CONFIRMATION)
        kept |= {confirmed["winner"]} if confirmed else set()
        for trial in finished:
            if trial.number not in kept:
                folder = self.folder_of(trial.number)
                for weights in (folder.adapter, folder.checkpoints):
                    shutil.rmtree(weights, ignore_errors=True)

    def ranked(self) -> list[FrozenTrial]:
        """Complete trials, the best first; of several objectives those that nothing beats in all, then the rest."""
        complete = self.trials(TrialState.COMPLETE)
        if len(self.optuna.directions) > 1:
            front = {trial.number for trial in self.optuna.best_trials}
            return sorted(complete, key=lambda trial: (trial.number not in front, trial.number))
        return sorted(complete, key=lambda trial: (self.cost(trial.value or 0.0), trial.number))

    def cost(self, value: float) -> float:
        """A value of the one objective, turned so that less is better."""
        return value if self.optuna.direction == optuna.study.StudyDirection.MINIMIZE else -value

    def baseline(self) -> FrozenTrial | None:
        """The trial of the config's own values, if it is complete."""
        return next((trial for trial in self.trials(TrialState.COMPLETE) if role(trial) == "baseline"), None)


def _discard(folder: RunFolder) -> None:
    """Remove the folder of a trial that another machine has taken: it would look like one of ours later."""
    if {entry.name for entry in folder.path.iterdir()} == {".lock"}:
        (folder.path / ".lock").unlink()
        folder.path.rmdir()


def role(trial: FrozenTrial | optuna.Trial) -> str:
    """Why a trial is at its point: baseline, start, grid; empty where the sampler chose it."""
    return str(trial.user_attrs.get("role", ""))


def _require_same(name: str, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted({key.removeprefix("space.") for key in (*began, *now)}):
        then, given = (terms.get(f"space.{key}", terms.get(key)) for terms in (began, now))
        if then != given:
            part = "the search space" if f"space.{key}" in {*began, *now} else "the config"
            raise ConfigError(
                f"{key}={json.dumps(given)}: study {name} began with {json.dumps(then)} in {part}; "
                "give another hydra.sweeper.study_name, or hydra.sweeper.allow_change=true to go on with the change"
            )
