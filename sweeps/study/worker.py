"""A worker: loads one base, and claims trials for its slots until none is left.

A Hydra launcher runs a worker as a job, in this process or in another one. It is pickled, so it
carries everything that it needs.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState

from finetune.console import quiet_libraries
from finetune.engine.interrupt import Interrupt
from finetune.errors import Interrupted
from finetune.run.resources import shared_resources
from sweeps.study.baseline_seeds import BaselineSeeds
from sweeps.study.budget import has_spent_tokens
from sweeps.study.claims import claim_trial
from sweeps.study.errors import StorageLost
from sweeps.study.joblib_processes import working
from sweeps.study.logs import run_lines_to_files
from sweeps.study.pack import PackedRun, train_together
from sweeps.study.session import Session
from sweeps.study.starts import needs_isolation
from sweeps.study.study import Study
from sweeps.study.trial import TrialRunner
from sweeps.study.worker_place import worker_place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """The task that a launcher runs in each process."""

    session: Session
    only: int | None = None
    """The number of the running trial that it adopts, and no other; None: any."""

    def __call__(self, composed: DictConfig) -> float:
        """Train trials until none is left; return the number of trials that ended."""
        _enter_directory(self.session)
        below_live_table = not self.session.sweeper.is_this and sys.stderr.isatty()
        # The launcher numbers its jobs from 0.
        index = HydraConfig.get().job.num
        try:
            with (
                working,
                worker_place(self.session, index),
                run_lines_to_files(warnings_only=below_live_table),
            ):
                # A float, because launchers pickle what a job returns.
                return float(self._work(index))
        finally:
            if self.session.is_orphaned:
                # Nobody is left who would give this process another job or read its result.
                os._exit(1)

    def _work(self, index: int) -> int:
        quiet_libraries(bars=False)
        session = self.session
        _select_gpus(session, index)
        study = Study(
            session.folder,
            session.settings.study_name,
            session.address,
            lost_after=session.settings.lost_after,
        )
        trials = _TrialSource(session, study)
        baseline_seeds = BaselineSeeds(session, study, trials.interrupt)

        def next_trial() -> PackedRun | None:
            return trials.next_run(self._accepts)

        def next_seed() -> PackedRun | None:
            return trials.unless_over(baseline_seeds.next_run)

        def next_run() -> PackedRun | None:
            # Without a number of trials, no slot is left over before the budget is spent.
            if study.total is None:
                return next_seed() or next_trial()
            return next_trial() or next_seed()

        signals: AbstractContextManager[None] = contextlib.nullcontext()
        if not session.sweeper.is_this:
            # A scheduler ends a job by a signal to all its processes. The sweep command would take
            # one that dies of it, while it loads its base, for a worker that was lost.
            signals = trials.interrupt.handle_signals()
        ended = 0
        try:
            borrows = session.engine.borrows_blocks and self.only is None
            with (
                _kept_alive(study, trials.interrupt),
                signals,
                shared_resources.borrowed_blocks(borrows),
            ):
                if self.only is not None:
                    ended = train_together(next_trial, 1)
                else:
                    ended = train_together(next_run, session.engine.slots)
        except Interrupted:
            if study.storage_error is None:
                raise
        # The runs say only that they were interrupted; the lost storage is the reason.
        if study.storage_error is not None:
            raise study.storage_error
        return ended

    def _accepts(self, trial: FrozenTrial) -> bool:
        """Whether this worker may train a trial: one that needs isolation trains alone."""
        if self.only is not None:
            return trial.number == self.only
        return not needs_isolation(trial)


def _enter_directory(session: Session) -> None:
    """Go to the directory of the command, where its relative paths begin: Ray's workers are not."""
    directory = Path(session.config.hydra.runtime.cwd)
    if directory.is_dir():
        os.chdir(directory)


def _select_gpus(session: Session, index: int) -> None:
    """Make the GPUs of the worker with this number visible to it, and no others."""
    from finetune.model.device import select_gpus

    # submitit's local jobs see the first GPUs by number, or none, whatever the command sees.
    is_local_job = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    select_gpus(
        index,
        session.settings.gpus_per_worker,
        session.gpus if is_local_job else None,
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        log.info("worker %d: GPU %s", index, visible)


def _kept_alive(study: Study, interrupt: Interrupt) -> AbstractContextManager[None]:
    """Write heartbeats within the block, where the study's trials have leases."""
    if study.leases is None:
        return contextlib.nullcontext()

    def give_up(error: StorageLost) -> None:
        study.release_trials(error, interrupt)

    return study.leases.kept_alive(give_up)


class _TrialSource:
    """Claims trials for the slots of one worker."""

    def __init__(self, session: Session, study: Study) -> None:
        self._session = session
        self._study = study
        self.interrupt = Interrupt()
        """Shared by all runs of this worker."""
        self._unfetched: set[int] = set()
        """Trials whose copies could not be read: they are left to a later worker."""

    def next_run(self, accepts: Callable[[FrozenTrial], bool]) -> PackedRun | None:
        """Claim the next acceptable trial; None if there is none, or if none shall begin."""
        return self.unless_over(lambda: self._claim_run(accepts))

    def unless_over(self, begin: Callable[[], PackedRun | None]) -> PackedRun | None:
        """Begin a run, unless the session is over or the storage is lost."""
        if self._study.storage_error is not None or self.interrupt.requested:
            return None
        try:
            if self._session.is_over(self._study):
                return None
            return begin()
        except StorageLost as error:
            self._study.release_trials(error, self.interrupt)
            return None

    def _claim_run(self, accepts: Callable[[FrozenTrial], bool]) -> PackedRun | None:
        begins_trials = not has_spent_tokens(self._study)

        def is_acceptable(trial: FrozenTrial) -> bool:
            # A trial that lost its worker goes on: its tokens would be wasted otherwise.
            may_run = begins_trials or trial.state == TrialState.RUNNING
            return may_run and trial.number not in self._unfetched and accepts(trial)

        with contextlib.ExitStack() as stack:
            claim = stack.enter_context(claim_trial(self._study, is_acceptable))
            if claim is None:
                return None
            runner = TrialRunner(self._session, self._study, claim, self.interrupt)
            if runner.fetch():
                # From here on the run holds the claim.
                steps = runner.run(folder_lock=stack.pop_all())
                return PackedRun(
                    name=str(claim.number),
                    steps=steps,
                    log_file=claim.folder.path / "train.log",
                    packed_with=runner.packed_with,
                )
        self._unfetched.add(claim.number)
        return self._claim_run(accepts)
