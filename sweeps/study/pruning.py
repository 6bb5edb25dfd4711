"""The observer of a trial's run: reports its rungs to the study, and stops it."""

import logging
import time
from typing import ClassVar

import optuna
from optuna.trial import FrozenTrial

from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer, Rung
from finetune.files.run_folder import Metrics
from finetune.metrics.names import describe_metric, format_metric
from finetune.run.resources import shared_resources
from finetune.tracking.finished import remove_tag
from sweeps.space.constraints import violations
from sweeps.space.feasibility import store_violations
from sweeps.space.pruners import RUNGS, WARMUP_RUNG, rung_values
from sweeps.study.budget import TRAIN_TOKENS
from sweeps.study.errors import LeaseLost, StorageLost
from sweeps.study.final_time import estimate_final_seconds, record_final_seconds
from sweeps.study.notification import record_step
from sweeps.study.roles import role
from sweeps.study.session import Session
from sweeps.study.study import OUT_OF_TIME, Study

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Seconds between two looks at the clock and at the storage while a trial trains."""

PAUSE_FACTOR = 20
"""The same as a multiple of how long such a look takes: with a thousand workers on one database it
reads a thousand running trials."""


class PruningObserver(Observer):
    """Stops a trial that the pruner gives up, that the user stops, or that is out of time.

    A trial is judged at each rung that it reports, and again by its last rung as other trials
    report theirs: after each report in this process, and every `POLL_SECONDS` for the others.
    Rungs within the learning rate's warm-up are reported, but not judged: a rate that is still
    rising ranks trials by their schedules.

    Args:
        session: the session.
        study: the study.
        trial: the trial, with the study's pruner.
        trial_id: the storage's id of the trial.
        interrupt: the interrupt that this worker's trials share.
        poll_seconds: seconds between two looks at the clock and at the storage.
    """

    reports: ClassVar[int] = 0
    """Number of reports of all trials in this process."""

    def __init__(
        self,
        session: Session,
        study: Study,
        trial: optuna.Trial,
        trial_id: int,
        interrupt: Interrupt,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._session = session
        self._study = study
        self._trial = trial
        self._trial_id = trial_id
        self._interrupt = interrupt
        self.poll_seconds = poll_seconds
        self._last_poll = time.monotonic()
        self._pause = 0.0
        stored_trial = self._stored_trial()
        self._reported_rungs = set(rung_values(stored_trial))
        last_rung = max(self._reported_rungs, default=0)
        is_judged = last_rung > stored_trial.user_attrs.get(WARMUP_RUNG, 0)
        # The value of `reports` when the trial was last judged; None: it has reported no rung after
        # its warm-up yet. An adopted trial was judged in another process, so it is due.
        self._judged_at_report: int | None = -1 if is_judged else None

    def _stored_trial(self) -> FrozenTrial:
        return self._study.storage.get_trial(self._trial_id)

    def on_step(self, step: int) -> bool:
        try:
            return self._stops_after_step()
        except StorageLost as error:
            self._study.release_trials(error, self._interrupt)
            return False

    def _stops_after_step(self) -> bool:
        began = time.monotonic()
        polls = began - self._last_poll >= max(self.poll_seconds, self._pause)
        try:
            return self._looks_and_stops(polls)
        finally:
            if polls:
                self._last_poll = time.monotonic()
                self._pause = PAUSE_FACTOR * (self._last_poll - began)

    def _looks_and_stops(self, polls: bool) -> bool:
        if self._is_due(polls) and self._is_pruned():
            return self._stop("worse than others at its last rung, as more came to it")
        if not polls:
            return False
        record_step(self._study, self._session.common.notify)
        # The run ends itself at an interrupt, with a checkpoint; to stop it here would prune it.
        if self._session.is_stopping:
            self._interrupt.requested = True
            return False
        leases = self._study.leases
        if leases is not None and not leases.holds(self._trial_id):
            raise LeaseLost("another worker has taken it")
        if self._stored_trial().user_attrs.get("stop"):
            return self._stop("told to stop")
        is_out_of_time = self._session.is_out_of_time(self._study)
        return is_out_of_time and self._stop(OUT_OF_TIME)

    def _is_due(self, polls: bool) -> bool:
        """Whether other trials may have reported a rung since this one was judged."""
        if self._judged_at_report is None:
            return False
        # Reports in this process are counted; those of other workers show only in the storage.
        return polls or self._judged_at_report < self.reports

    def on_rung(self, rung: Rung) -> None:
        """Report a rung. The evaluation before training is none: there all trials are alike."""
        self._trial.set_user_attr(TRAIN_TOKENS, rung.train_tokens)
        # The evaluation before the first step is the base's, and all trials share its result.
        if self._session.deadline is not None and rung.index > 0:
            self._record_final_seconds(rung)
        if rung.index == 0:
            self._trial.set_user_attr("steps", rung.total)
        constraints = self._session.settings.parsed_constraints
        distances = violations(constraints, rung.constants, is_final=False)
        store_violations(self._trial, distances)
        if not self._is_reportable(rung):
            return
        # Before the report, so that no process reads the report without it.
        if rung.is_warmup:
            self._trial.set_user_attr(WARMUP_RUNG, rung.index)
        # A trial that resumes from a checkpoint comes again to rungs that it has reported.
        if rung.index not in self._reported_rungs:
            self._report(rung)
        texts = [
            f"{describe_metric(name)} {format_metric(value)}"
            for name, value in zip(
                self._study.objectives, self._values(rung), strict=True
            )
        ]
        log.info(
            "trial %d: step %d, %s", self._trial.number, rung.step, ", ".join(texts)
        )

    def _report(self, rung: Rung) -> None:
        """Report a rung by its index: trials with other batch sizes take other steps to it."""
        values = self._values(rung)
        if len(values) == 1:
            self._trial.report(values[0], rung.index)
        else:
            # Optuna takes no reports of trials with several objectives.
            rungs = {**self._trial.user_attrs.get(RUNGS, {}), str(rung.index): values}
            self._trial.set_user_attr(RUNGS, rungs)
        PruningObserver.reports += 1

    def _values(self, rung: Rung) -> list[float]:
        """Return the objectives at a rung."""
        if "objective" in rung.metrics:
            return [rung.metrics["objective"]]
        figures = {**rung.metrics, **rung.constants}
        return [figures[name] for name in self._study.objectives]

    def _record_final_seconds(self, rung: Rung) -> None:
        from finetune.model.device import on_gpu

        estimate = estimate_final_seconds(
            self._session.common,
            shared_resources,
            rung.seconds,
            is_gpu=on_gpu(),
            has_answers=rung.has_answers,
        )
        record_final_seconds(self._study, estimate)

    def should_prune(self, rung: Rung) -> bool:
        """Whether the pruner gives the trial up at a rung. After the last step nothing is saved."""
        if rung.index == 0 or rung.step >= rung.total:
            return False
        if self._can_not_win():
            return self._stop("can't win")
        if not self._is_reportable(rung) or rung.is_warmup:
            return False
        return self._is_pruned() and self._stop("worse than others at this rung")

    def _is_pruned(self) -> bool:
        self._judged_at_report = self.reports
        # The pruner is asked for the baseline too: some of Optuna's note whom they have judged.
        if len(self._session.settings.directions) == 1:
            is_pruned = self._trial.should_prune()
        else:
            study = self._trial.study
            is_pruned = study.pruner.prune(study, self._stored_trial())
        return is_pruned and role(self._trial) != "baseline"

    def _can_not_win(self) -> bool:
        """Whether the trial violates a constraint, and need not go on."""
        is_baseline = role(self._trial) == "baseline"
        is_violated = any(value > 0 for value in self._trial.constraints.values())
        return is_violated and not is_baseline and self._session.settings.can_prune

    def _is_reportable(self, rung: Rung) -> bool:
        if len(self._session.settings.directions) == 1:
            return rung.index > 0 and "objective" in rung.metrics
        # Answers are generated at some rungs only.
        figures = {*rung.metrics, *rung.constants}
        return rung.index > 0 and figures.issuperset(self._study.objectives)

    def _stop(self, reason: str) -> bool:
        self._trial.set_user_attr("reason", reason)
        return True

    def on_completed(self, metrics: Metrics) -> list[str]:
        """Return the tag `best` if the trial is the best so far, and untag the previous best."""
        objectives = self._study.objectives
        if len(objectives) > 1 or objectives[0] not in metrics:
            return []
        constraints = self._session.settings.parsed_constraints
        distances = violations(constraints, metrics, is_final=False)
        if any(distance > 0 for distance in distances.values()):
            return []
        best = next(iter(self._study.ranked()), None)
        if best is not None and best.value is not None:
            cost = self._study.to_cost(metrics[objectives[0]])
            if cost >= self._study.to_cost(best.value):
                return []
            remove_tag(self._study.folder_of(best.number), "best")
        return ["best"]
