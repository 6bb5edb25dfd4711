"""A worker: holds one loaded base, and claims trials and gives them slots until none is left.

A worker is the task that a Hydra launcher runs, in this process or in others: it carries all it needs.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from optuna.trial import FrozenTrial

from finetune.console import quiet_libraries
from finetune.engine.interrupt import Interrupt
from finetune.errors import Interrupted
from sweeps.study.errors import StorageLost
from sweeps.study.pack import PackedRun, runs_log_to_files, train_together
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.trial import TrialRunner, is_on_last_attempt


@dataclass(frozen=True)
class Worker:
    """The task that a launcher runs: one process, or this one, that trains trials of a session."""

    session: Session

    def __call__(self, composed: DictConfig) -> float:
        """Work until no trial is left; returns the number of trials finished. What a launcher calls."""
        session = self.session
        try:
            with runs_log_to_files(beside=os.getpid() != session.process and sys.stderr.isatty()):
                return self._work()
        finally:
            if session.is_orphan:
                os._exit(1)  # nobody is there to be told; waiting for orders would only hold the base's memory

    def _work(self) -> float:
        quiet_libraries(bars=False)
        from finetune.model.device import take_device

        take_device(HydraConfig.get().job.num)
        session, interrupt = self.session, Interrupt()
        study = Study(session.folder, session.settings.study_name, session.address)
        try:
            alone = train_together(lambda: self._next(study, interrupt, is_on_last_attempt), 1)
            beside = train_together(
                lambda: self._next(study, interrupt, lambda trial: not is_on_last_attempt(trial)), session.slots
            )
        except Interrupted:
            if study.lost is None:
                raise
        if study.lost is not None:  # the reason why trials were interrupted
            raise study.lost
        return float(alone + beside)

    def _next(self, study: Study, interrupt: Interrupt, wanted: Callable[[FrozenTrial], bool]) -> PackedRun | None:
        """The next wanted trial, in a slot; None if there is none, or none shall begin."""
        if study.lost is not None:
            return None
        try:
            return self._claimed(study, interrupt, wanted)
        except StorageLost as error:
            study.lost, interrupt.asked = error, True  # the trials beside it end with a checkpoint
            return None

    def _claimed(self, study: Study, interrupt: Interrupt, wanted: Callable[[FrozenTrial], bool]) -> PackedRun | None:
        if self.session.is_over(study):
            return None
        with contextlib.ExitStack() as held:
            claim = held.enter_context(study.claim(wanted))
            if claim is None:
                return None
            turn = TrialRunner(self.session, study, claim, interrupt)
            return PackedRun(
                str(claim.number), turn.take(held.pop_all()), claim.folder.path / "train.log", turn.packed_with
            )
