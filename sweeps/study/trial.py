"""One trial on a worker: its config is composed, it trains, and the study stores its outcome."""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import optuna
from omegaconf import DictConfig

from finetune.config.schema import RunConfig
from finetune.console import error_line
from finetune.engine.interrupt import Interrupt
from finetune.engine.steps import RunSteps
from finetune.errors import (
    ConfigError,
    Interrupted,
    is_out_of_memory_error,
    is_out_of_memory_message,
)
from finetune.files.atomic import read_json
from finetune.files.mirror import Mirror
from finetune.model.memory import free_memory
from finetune.run.context import RunContext
from finetune.run.resources import shared_resources
from finetune.run.result import Objective
from finetune.run.run import run_steps
from finetune.tracking.tracker import Label
from sweeps.compat import job_error
from sweeps.study.adapters import remove_adapters
from sweeps.study.claims import Claim
from sweeps.study.errors import LeaseLost, StorageLost
from sweeps.study.formatting import format_value, trial_name
from sweeps.study.inside import point_of
from sweeps.study.job import run_as_job
from sweeps.study.mirrored import fetch_trial, has_started
from sweeps.study.outcome import Outcome
from sweeps.study.pruning import PruningObserver
from sweeps.study.recording import record_outcome, write_failed
from sweeps.study.roles import role
from sweeps.study.session import Session
from sweeps.study.smaller_batch import smaller_batch
from sweeps.study.starts import record_start
from sweeps.study.study import TRIALS, Study
from sweeps.study.suggestion import open_trial, suggest_point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failure:
    """Why an attempt at a trial ended. The exception itself would keep the run's memory alive."""

    reason: str
    is_out_of_memory: bool


class TrialRunner:
    """Runs a claimed trial, and stores its outcome in the study.

    Args:
        session: the session.
        study: the study.
        claim: the trial and its locked folder.
        interrupt: the interrupt that this worker's trials share.
    """

    def __init__(
        self,
        session: Session,
        study: Study,
        claim: Claim,
        interrupt: Interrupt,
    ) -> None:
        self._session = session
        self._study = study
        self._claim = claim
        self._interrupt = interrupt
        self._folder = claim.folder
        self.packed_with: set[str] = set()
        """Names of the runs that have trained together with this trial."""
        self._mirror = Mirror(session.common.mirror)
        self.trial = open_trial(session, study, claim.number, claim.trial_id)

    def fetch(self) -> bool:
        """Fetch the trial from the mirror if another machine has begun it.

        Called before the trial's log is open, by which `fetch_trial` sees that a trial is here.

        Returns:
            Whether it can go on. To begin it anew would replace the copy.
        """
        try:
            if has_started(self.trial):
                fetch_trial(self._mirror, self._folder)
        except ConfigError as error:
            number = self._claim.number
            log.warning(
                "trial %d: %s; it stays running, to be adopted later", number, error
            )
            return False
        return True

    def run(self, folder_lock: contextlib.ExitStack) -> RunSteps[None]:
        """Run the trial, or store the outcome that its folder has already.

        Args:
            folder_lock: holds the claim; closed when the trial ends.

        Raises:
            Interrupted: the trial stays running, to be adopted later.
        """
        with folder_lock:
            try:
                yield from self._run_unless_finished()
            except StorageLost as error:
                self._study.release_trials(error, self._interrupt)
                raise
            except LeaseLost as error:
                log.warning("trial %d: %s", self._claim.number, error)

    def _run_unless_finished(self) -> RunSteps[None]:
        result = read_json(self._folder.result) or {}
        if self._is_finished(result):
            # Its worker was lost between the run's end and this call: it is not run again.
            self._record(Outcome.of_result(result, self._study.objectives))
        else:
            record_start(self.trial, self._folder)
            outcome = yield from self._run_with_memory_retry()
            self._record(outcome)
        keep = self._session.settings.keep_adapters
        remove_adapters(self._study, keep, self._mirror)

    def _is_finished(self, result: dict[str, Any]) -> bool:
        """Whether the run had ended before its worker was lost, and is not to be tried again."""
        status = result.get("status")
        # The worker was lost after the run had failed, and before it began again.
        if status == "failed" and is_out_of_memory_message(str(result.get("error"))):
            return not self._reduce_batch()
        return status in ("completed", "pruned", "failed")

    def _run_with_memory_retry(self) -> RunSteps[Outcome]:
        """Run the trial; after an out-of-memory error, once more with a smaller batch."""
        failure = yield from self._attempt()
        if failure is not None and failure.is_out_of_memory and self._reduce_batch():
            failure = yield from self._attempt()
        if failure is None:
            result = read_json(self._folder.result)
            return Outcome.of_result(result, self._study.objectives)
        # Without a result, the config was refused before a run began.
        if not self._folder.result.exists():
            write_failed(self._folder, failure.reason)
        return Outcome.failed(failure.reason)

    def _attempt(self) -> RunSteps[_Failure | None]:
        """Run the trial; return why it failed, or None."""
        try:
            overrides = self.suggest_overrides()
            overrides += self.trial.user_attrs.get("shrunk", [])
            # Before this attempt's own files: what an earlier one left is removed there, and the
            # study says that the trial has started, and with which values.
            self._mirror.copy_run(self._folder.path)
            self._mirror.copy(self._study.folder, without=[TRIALS])
            yield from self._train(overrides)
        # An exception like others to Python, but no failure: the trial stays running.
        except Interrupted:
            raise
        except Exception as error:
            failure = _Failure(error_line(error), is_out_of_memory_error(error))
        else:
            return None
        # Outside the handler: within it, the exception's traceback holds the run's tensors.
        free_memory()
        return failure

    def _record(self, outcome: Outcome) -> None:
        record_outcome(self._session, self._study, self.trial, self._folder, outcome)

    def suggest_overrides(self) -> list[str]:
        """Let the sampler choose the trial's point; return the trial's command line."""
        space = self._session.space
        for name, value in space.fixed.items():
            self.trial.set_user_attr(name, value)
        point = suggest_point(self._session, self._study, self.trial)
        assignments = []
        for name, value in point.items():
            assignments.append(f"{name}={format_value(value)}")
        log.info(
            "trial %d: %s%s",
            self.trial.number,
            ", ".join(assignments),
            _role_note(self.trial),
        )
        return [*space.overrides(point), *self._session.common_overrides]

    def _train(self, overrides: list[str]) -> RunSteps[None]:
        """Compose the trial's config, and run it in the trial's folder. Raises the run's error."""
        observer = PruningObserver(
            self._session,
            self._study,
            self.trial,
            self._claim.trial_id,
            self._interrupt,
        )
        context = RunContext(
            observer=observer,
            resources=shared_resources,
            label=self._label(),
            interactive=False,
            # No choice of the study may see the test rows: its winner is evaluated at the end.
            evaluate_test_rows=False,
            # Only the adapters of complete trials stay (`remove_adapters`).
            saves_pruned_adapter=False,
            interrupt=self._interrupt,
            slots=self._session.engine.slots,
            packed_with=self.packed_with,
        )

        def task(composed: DictConfig) -> RunSteps[Objective]:
            config = self._session.check(RunConfig.from_hydra(composed))
            return run_steps(config, self._folder, context)

        composed = self._session.compose(self._claim.number, overrides)
        job = yield from run_as_job(composed, self._session.hydra_context, task)
        error = job_error(job)
        if error is not None:
            raise error

    def _label(self) -> Label:
        """Return how trackers name the trial."""
        return Label(
            id=f"{self._study.uid}-{self._claim.number}",
            name=trial_name(self._claim.number, point_of(self.trial)),
            group=self._study.name,
            job_type="trial",
            folder=self._study.folder,
        )

    def _reduce_batch(self) -> bool:
        """After an out-of-memory error, plan a start with a smaller batch; once per trial.

        Returns:
            Whether the trial may start again. Its folder is empty then.
        """
        identity = read_json(self._folder.identity)
        # Without run.json no run had begun, and no batch is known that could be smaller.
        trainer = identity["config"]["trainer"] if identity else {}
        overrides = smaller_batch(trainer)
        if overrides is None or self.trial.user_attrs.get("shrunk"):
            return False
        message = "trial %d: out of memory; once more with less at once: %s"
        log.warning(message, self.trial.number, ", ".join(overrides))
        # Before the folder is cleared: a worker lost in between must not forget the overrides.
        self.trial.set_user_attr("shrunk", overrides)
        self._folder.clear()
        return True


def _role_note(trial: optuna.Trial) -> str:
    """Return, for the log, why a trial has its point if the sampler did not choose it."""
    notes = {
        "baseline": " (baseline: the config's own values)",
        "start": " (hydra.sweeper.start)",
        "added": " (added by hand)",
        "warm_start": " (hydra.sweeper.warm_start)",
    }
    return notes.get(role(trial), "")
