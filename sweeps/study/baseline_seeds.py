"""Further seeds of the baseline, trained in slots that no trial needs.

They show how far equal configs differ by their seeds alone, so that the answer can say whether the
winner's config is better, or only its adapter. They are no trials, and stand under `baseline/`.
"""

import contextlib
import dataclasses
import time
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer
from finetune.files.atomic import read_json
from finetune.files.run_folder import FolderHeld, RunFolder
from finetune.run.load import read_run_config
from sweeps.study.notification import record_step
from sweeps.study.pack import PackedRun
from sweeps.study.pruning import POLL_SECONDS
from sweeps.study.repeats import Repeat, repeat_run
from sweeps.study.roles import role
from sweeps.study.session import Session
from sweeps.study.study import Study

AUTO_SEEDS = 2
"""Further seeds with `hydra.sweeper.baseline_seeds=auto` where trials train together."""


def planned_seeds(session: Session) -> int:
    """Return how many further seeds of the baseline a session trains."""
    if not session.settings.baseline or len(session.settings.directions) > 1:
        return 0
    seeds = session.settings.baseline_seeds
    if isinstance(seeds, int):
        return seeds
    return AUTO_SEEDS if session.engine.slots > 1 else 0


def baseline_repeats(study: Study, seeds: int) -> list[Repeat]:
    """Plan the runs of the baseline with further seeds.

    Args:
        study: the study.
        seeds: their number.

    Returns:
        The runs; none before the baseline has reported a rung, which shows that it can train. Of
        several machines that share a study, only the one that has the baseline's folder trains
        them.
    """
    baseline = _measured_baseline(study)
    if baseline is None:
        return []
    folder = study.folder_of(baseline.number)
    if not folder.identity.exists():
        return []
    config = read_run_config(folder.path)
    repeats = []
    for seed in range(config.seed + 1, config.seed + 1 + seeds):
        folder = study.baseline_seed_folder(seed)
        config_with_seed = dataclasses.replace(config, seed=seed)
        repeat = Repeat(baseline.number, seed, folder, config_with_seed, "baseline")
        repeats.append(repeat)
    return repeats


def _measured_baseline(study: Study) -> FrozenTrial | None:
    for trial in study.trials(TrialState.RUNNING, TrialState.COMPLETE):
        if role(trial) == "baseline" and trial.intermediate_values:
            return trial
    return None


class BaselineSeeds:
    """Hands the baseline's further seeds to the slots of one worker.

    Args:
        session: the session.
        study: the study.
        interrupt: the interrupt that this worker's runs share.
    """

    def __init__(self, session: Session, study: Study, interrupt: Interrupt) -> None:
        self._session = session
        self._study = study
        self._interrupt = interrupt
        self._seeds = planned_seeds(session)
        self._begun: set[int] = set()
        # A seed that fails says so in the log; its evaluation is missing then.
        self._errors: dict[Path, str] = {}

    def next_run(self) -> PackedRun | None:
        """Return the next seed that no worker has trained or trains; None if there is none."""
        if len(self._begun) >= self._seeds:
            return None
        for repeat in baseline_repeats(self._study, self._seeds):
            if repeat.seed in self._begun:
                continue
            self._begun.add(repeat.seed)
            if _needs_training(repeat.folder):
                return repeat_run(
                    self._study,
                    repeat,
                    self._interrupt,
                    self._session.engine.slots,
                    self._errors,
                    _Deadline(self._session, self._study, self._interrupt),
                )
        return None


def _needs_training(folder: RunFolder) -> bool:
    """Whether a seed's run is not completed, and no other worker trains it.

    A failed run is not tried again, and one that ran out of time begins anew.
    """
    with contextlib.suppress(FolderHeld), folder.locked():
        status = (read_json(folder.result) or {}).get("status")
        if status == "pruned":
            folder.clear()
        return status not in ("completed", "failed")
    return False


class _Deadline(Observer):
    """Stops a run when its session is out of time, and interrupts it when the session ends."""

    def __init__(self, session: Session, study: Study, interrupt: Interrupt) -> None:
        self._session = session
        self._study = study
        self._interrupt = interrupt
        self._last_poll = time.monotonic()

    def on_step(self, step: int) -> bool:
        if time.monotonic() - self._last_poll < POLL_SECONDS:
            return False
        self._last_poll = time.monotonic()
        record_step(self._study, self._session.common.notify)
        # The run ends itself at an interrupt, with a checkpoint; to stop it here would prune it.
        if self._session.is_stopping:
            self._interrupt.requested = True
            return False
        return self._session.is_out_of_time(self._study)
