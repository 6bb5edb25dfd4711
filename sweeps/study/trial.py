"""One trial on a worker: composed, run, judged at its rungs, and told to the study."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import optuna
from hydra.core.utils import JobStatus
from hydra.utils import get_method
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState

from finetune.config.schema import RunConfig
from finetune.console import error_line
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer, Rung
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import Metrics, checkpoint_step
from finetune.run.context import RunContext
from finetune.run.resources import shared_resources
from finetune.run.result import Objective
from finetune.run.run import run_steps
from finetune.tracking.tracker import Label
from finetune.tracking.wandb_finished import remove_tag
from sweeps.study.errors import StorageLost
from sweeps.study.formatting import format_value
from sweeps.study.job import run_as_job
from sweeps.study.session import Session
from sweeps.study.study import OUT_OF_TIME, Claim, Study, role

log = logging.getLogger(__name__)


LIVES = 3
"""How often a trial may lose its worker without a new checkpoint, before it is failed."""


LOOK_EVERY = 2.0
"""Seconds between looks at the clock and at the storage, whether the running trial shall stop."""


def is_on_last_attempt(trial: FrozenTrial) -> bool:
    """Whether a trial's next loss of its worker fails it: it trains alone, so that no neighbour is to blame."""
    starts = trial.user_attrs.get("starts", [])[1 - LIVES :]
    return len(starts) == LIVES - 1 and len(set(starts)) == 1


@dataclass(frozen=True)
class _Failure:
    """Why an attempt at a trial ended."""

    reason: str
    out_of_memory: bool


class TrialRunner:
    """One trial on a worker, from its claim to what the study is told of it."""

    def __init__(self, session: Session, study: Study, claim: Claim, interrupt: Interrupt) -> None:
        self.session, self.study, self.claim, self.interrupt = session, study, claim, interrupt
        self.folder = claim.folder
        self.packed_with: set[str] = set()
        sampler = session.sampler(claim.number)
        self.optuna = optuna.Study(study.name, study.storage, sampler=sampler, pruner=session.pruner())
        self.trial = optuna.Trial(self.optuna, claim.trial_id)

    def take(self, held: contextlib.ExitStack) -> RunSteps[None]:
        """Tell the trial what its folder knows already, or run it and tell what came out, holding its claim."""
        with held:
            try:
                yield from self._take()
            except StorageLost as error:
                self.leave(error)
                raise

    def _take(self) -> RunSteps[None]:
        from finetune.model.memory import says_out_of_memory

        known = read_json(self.folder.result) or {}
        status = known.get("status")
        retried = status == "failed" and says_out_of_memory(str(known.get("error"))) and self._shrink()
        if status in ("completed", "pruned", "failed") and not retried:
            self._tell_result(known)
        elif self._has_lost_too_many_workers(known):
            reason = f"lost its worker {LIVES} times without a new checkpoint"
            write_json(self.folder.result, {**known, "status": "failed", "error": reason})
            self._tell(TrialState.FAIL, error=reason)
        else:
            yield from self._run_and_tell()
        self.study.tidy(self.session.settings.keep_adapters)

    def leave(self, error: StorageLost) -> None:
        """End all trials of this worker after their steps in progress, with a checkpoint, to be taken on later."""
        self.study.lost = error
        self.interrupt.asked = True

    def _has_lost_too_many_workers(self, known: dict[str, Any]) -> bool:
        """Count this start; one after a clean interruption begins the count anew."""
        checkpoint = self.folder.last_checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        starts = list(self.trial.user_attrs.get("starts", []))
        if known.get("status") == "interrupted":
            starts = []
            self.folder.result.unlink()  # or it would excuse later starts too
        if starts[-LIVES:] == [step] * LIVES:
            return True
        self.trial.set_user_attr("starts", [*starts, step])
        return False

    def _run_and_tell(self) -> RunSteps[None]:
        failure = yield from self._attempt()
        if failure is not None and failure.out_of_memory and self._shrink():
            failure = yield from self._attempt()
        if failure is not None:
            if not self.folder.result.exists():  # its config was refused, so no run began
                write_json(self.folder.result, {"status": "failed", "error": failure.reason})
            self._tell(TrialState.FAIL, error=failure.reason)
        else:
            self._tell_result(read_json(self.folder.result))

    def _attempt(self) -> RunSteps["_Failure | None"]:
        """Run the trial; what went wrong is its own. No exception is kept: it would hold the memory of the run."""
        from finetune.model.memory import free_memory, out_of_memory

        try:
            yield from self._run([*self._overrides(), *self.trial.user_attrs.get("shrunk", [])])
        except Interrupted:
            raise
        except Exception as error:
            failure = _Failure(error_line(error), out_of_memory(error))
        else:
            return None
        free_memory()
        return failure

    def _overrides(self) -> list[str]:
        """The trial's command line: what all trials have, and what the sampler suggests for this one."""
        space, trial = self.session.space, self.trial
        for name, value in space.fixed.items():
            trial.set_user_attr(name, value)
        for name, distribution in space.distributions.items():
            trial._suggest(name, distribution)
        if self.session.settings.custom_search_space:
            extend: Callable[[DictConfig, optuna.Trial], None] = get_method(self.session.settings.custom_search_space)
            extend(self.session.config, trial)
        values = ", ".join(f"{name}={format_value(value)}" for name, value in trial.params.items())
        log.info("trial %d: %s%s", trial.number, values, self._note())
        return [*space.overrides(trial.params), *self.session.common_overrides]

    def _note(self) -> str:
        """Why the trial is at its point, if the sampler did not choose it."""
        why = {"baseline": " (baseline: the config's own values)", "start": " (hydra.sweeper.start)"}
        return why.get(role(self.trial), "")

    def _run(self, overrides: list[str]) -> RunSteps[None]:
        """Compose the trial's config as Hydra does, and run it in its folder. Raises what went wrong."""
        session, number = self.session, self.claim.number
        label = Label(
            id=f"{self.study.uid}-{number}",
            name=f"{self.study.name}-{number}",
            group=self.study.name,
            job_type="trial",
        )
        part = RunContext(
            observer=PruningObserver(self),
            resources=shared_resources,
            label=label,
            interactive=False,
            evaluate_test_rows=False,
            interrupt=self.interrupt,
            slots=session.slots,
            packed_with=self.packed_with,
        )

        def task(composed: DictConfig) -> RunSteps[Objective]:
            return run_steps(session.check(RunConfig.from_hydra(composed)), self.folder, part)

        done = yield from run_as_job(session.compose(number, overrides), session.hydra_context, task)
        if done.status == JobStatus.FAILED:
            raise done._return_value

    def _shrink(self) -> bool:
        """Half the batch (or a smaller part) and accumulation that makes up for it, from the start; once."""
        composed = read_json(self.folder.identity)
        trainer = composed["config"]["trainer"] if composed else {}
        rows, accumulation = (
            trainer.get("per_device_train_batch_size", 1),
            trainer.get("gradient_accumulation_steps", 1),
        )
        measured = trainer.get("per_device_eval_batch_size", 1)
        if rows == measured == 1 or self.trial.user_attrs.get("shrunk"):
            return False
        parts = next((part for part in range(2, rows + 1) if rows % part == 0), 1)
        shrunk = [
            f"trainer.per_device_train_batch_size={rows // parts}",
            f"trainer.gradient_accumulation_steps={accumulation * parts}",
            f"trainer.per_device_eval_batch_size={max(1, measured // 2)}",
        ]
        log.warning("trial %d: out of memory; once more with less at once: %s", self.trial.number, ", ".join(shrunk))
        self.trial.set_user_attr("shrunk", shrunk)
        self.folder.clear()
        return True

    def _tell_result(self, result: dict[str, Any]) -> None:
        """Tell what the folder's `result.json` says."""
        if result["status"] == "failed":
            self._tell(TrialState.FAIL, error=result["error"])
        elif result["status"] == "pruned":
            self._tell(TrialState.PRUNED, step=result["step"])
        else:
            values = [result["metrics"].get(name) for name in self.study.objectives]
            if None in values:
                self._tell(TrialState.FAIL, error=f"the run gave no {self.study.objectives[values.index(None)]}")
            else:
                self._tell(TrialState.COMPLETE, values, step=result["step"])

    def _tell(self, state: TrialState, values: list[float] | None = None, **notes: Any) -> None:
        for name, note in notes.items():
            self.trial.set_user_attr(name, note)
        self.optuna.tell(self.trial, values, state, skip_if_finished=True)
        if values is not None:
            pairs = zip(self.study.objectives, values, strict=True)
            said = f"completed, {', '.join(f'{name} {value:.4f}' for name, value in pairs)}"
        else:
            said = f"pruned at step {notes['step']}" if state == TrialState.PRUNED else f"failed: {notes['error']}"
        log.info("trial %d: %s", self.trial.number, said)


class PruningObserver(Observer):
    """Reports a trial's rungs to the study, and stops it: pruned, told to stop, or out of time."""

    reports: ClassVar[int] = 0
    """Of all trials in this process: after each one those that train are judged anew."""

    def __init__(self, turn: TrialRunner) -> None:
        self._turn, self._trial, self._looked = turn, turn.trial, time.monotonic()
        self._reported = set(self._frozen().intermediate_values)
        self._heard: int | None = -1 if self._reported else None
        """Of all reports, when the trial was judged last; -1: in another process. None: there is nothing to judge."""

    def _frozen(self) -> FrozenTrial:
        return self._turn.study.storage.get_trial(self._turn.claim.trial_id)

    def on_step(self, step: int) -> bool:
        try:
            return self._stops()
        except StorageLost as error:
            self._turn.leave(error)
            return False

    def _stops(self) -> bool:
        looks = time.monotonic() - self._looked >= LOOK_EVERY
        if self._heard is not None and (looks or self._heard < self.reports) and self._is_hopeless():
            return self._ends("worse than others at its last rung, as more came to it")
        if not looks:
            return False
        self._looked = time.monotonic()
        if self._turn.session.asked_to_end:
            self._turn.interrupt.asked = True
            return False
        if self._frozen().user_attrs.get("stop"):
            return self._ends("told to stop")
        return self._turn.session.out_of_time and self._ends(OUT_OF_TIME)

    def on_rung(self, rung: Rung) -> None:
        """Rungs count from the first evaluation after training began: before it all trials are alike."""
        if rung.index == 0:
            self._trial.set_user_attr("steps", rung.total)
        if self._can_be_judged(rung):
            value = rung.metrics["objective"]
            if rung.index not in self._reported:
                self._trial.report(value, rung.index)
                PruningObserver.reports += 1
            name = self._turn.study.objectives[0]
            log.info("trial %d: step %d, %s %.4f", self._trial.number, rung.step, name, value)

    def judge(self, rung: Rung) -> bool:
        judges = self._can_be_judged(rung) and rung.step < rung.total
        return judges and self._is_hopeless() and self._ends("worse than others at this rung")

    def _is_hopeless(self) -> bool:
        self._heard = self.reports
        return self._trial.should_prune() and role(self._trial) != "baseline"  # Optuna's note who was asked

    def _can_be_judged(self, rung: Rung) -> bool:
        return rung.index > 0 and "objective" in rung.metrics and len(self._turn.session.settings.directions) == 1

    def _ends(self, reason: str) -> bool:
        self._trial.set_user_attr("reason", reason)
        return True

    def on_completed(self, metrics: Metrics) -> list[str]:
        """The best so far carries the tag `best`, which the one before it loses."""
        study = self._turn.study
        if len(study.objectives) > 1 or study.objectives[0] not in metrics:
            return []
        before = next(iter(study.ranked()), None)
        if before is not None and before.value is not None:
            if study.cost(metrics[study.objectives[0]]) >= study.cost(before.value):
                return []
            remove_tag(study.folder_of(before.number), "best")
        return ["best"]
