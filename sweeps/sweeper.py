"""The Hydra sweeper `hydra/sweeper=optuna`: begins or resumes a study, runs workers, concludes.

Registered as a plugin by the package's entry point, so Hydra imports it at every start: everything
heavy is imported when a sweep begins.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

from finetune.compat import fast_imports, import_transformers
from finetune.console import error_line, exit_code
from finetune.errors import ConfigError, Interrupted, NoAnswer
from finetune.files.atomic import read_json
from finetune.files.lock import file_lock
from finetune.files.mirror import Mirror
from finetune.quantities import counted
from sweeps.study.errors import StorageLost
from sweeps.study.find_study import load_study
from sweeps.study.queued_jobs import describe_jobs
from sweeps.study.queued_notification import QueuedStudy

if TYPE_CHECKING:
    from pathlib import Path

    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from sweeps.study.draft import Draft
    from sweeps.study.session import Session
    from sweeps.study.study import Study

log = logging.getLogger(__name__)

QUEUED_SWEEPER = "sweeps.sweeper.QueuedSweeper"
"""The sweeper of a queue's jobs; nobody chooses it in a config."""


class StudySweeper(Sweeper):
    """Searches with Optuna; the keys are those of `conf/hydra/sweeper/optuna.yaml`."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def setup(
        self,
        *,
        hydra_context: "HydraContext",
        task_function: "TaskFunction",
        config: "DictConfig",
    ) -> None:
        """Store Hydra's context and config. The workers, not the task function, run the trials."""
        self._hydra_context = hydra_context
        self._config = config

    def sweep(self, arguments: list[str]) -> "Path":
        """Run one session: until the study has its trials, is out of time, or is interrupted.

        Returns:
            The study's folder.
        """
        draft = self._draft(arguments)
        from sweeps.study.queue import queue_name

        queue = queue_name(self._config, draft.session.settings)
        if queue is not None:
            return self._sweep_in_queue(draft.session, queue, arguments)
        study, session = _open(draft)
        # After the checks, because these modules load torch.
        from sweeps.study.launching import run_workers
        from sweeps.study.notification import notified_at_end
        from sweeps.study.stored_command import store_command

        store_command(study, self._config, arguments)
        with (
            _copied_at_end(study, session),
            notified_at_end(study, session.common.notify),
        ):
            _enqueue(study, draft)
            if _has_work(study, draft):
                run_workers(study, session)
                _explain_end(study, session)
            _conclude_alone(study, session)
        return study.folder

    def _draft(self, arguments: list[str]) -> "Draft":
        """Check the command."""
        from sweeps.study.draft import draft_session

        # Hydra's lines on each launch and job would stand between those of the study.
        for library in ("hydra", "hydra_plugins"):
            logging.getLogger(library).setLevel(logging.WARNING)
        return draft_session(self._config, self._hydra_context, self._values, arguments)

    def _sweep_in_queue(
        self, session: "Session", queue: str, arguments: list[str]
    ) -> "Path":
        """Queue the session's jobs; unless it is detached, wait for them and print the answer."""
        from sweeps.queued_session import QueuedSession
        from sweeps.study.queue import await_jobs, job_workers, submit
        from sweeps.study.stored_command import OF_THE_JOBS, command_of

        settings = session.settings
        count, workers = job_workers(self._config, settings, queue)
        command = command_of(self._config, arguments, OF_THE_JOBS)
        words = [
            *command.words(settings.study_name, session.folder, QUEUED_SWEEPER),
            "hydra/launcher=slots",
            f"hydra.sweeper.n_jobs={'null' if workers is None else workers}",
            "hydra.sweeper.detach=false",
        ]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        session.folder.mkdir(parents=True, exist_ok=True)
        queued_study = _queued_study(session)
        queued_study.begin_session()
        queued_session = QueuedSession(
            words, QueuedSweeper, command.working_directory, gpus, queued_study
        )
        jobs = submit(
            self._config,
            settings,
            session.folder,
            queue,
            queued_session,
            count,
        )
        name = settings.study_name
        queued = describe_jobs(queue, [job.job_id for job in jobs])
        follow = f"python -m sweeps show {shlex.quote(os.path.relpath(session.folder))}"
        log.info("study %s: queued as %s; %s follows it", name, queued, follow)
        if not settings.detach:
            try:
                await_jobs(jobs)
            except (Interrupted, ConfigError) as error:
                # Jobs that never began, or were killed, have not told of it.
                queued_study.tell_error(exit_code(error), error_line(error))
                raise
            _print_answer(session.folder)
        return session.folder


def _open(draft: "Draft") -> "tuple[Study, Session]":
    """Begin or resume the study of a checked command."""
    # After the checks, because it takes seconds.
    with fast_imports():
        # First: other modules would import parts of it that nothing here needs.
        import_transformers()
        from sweeps.study.opening import open_study

    study, session = open_study(draft.session)
    if session.settings.stop_when == "no_gain":
        from sweeps.answer.more_trials import no_gain

        session = dataclasses.replace(session, end_rule=no_gain)
    return study, session


def _copied_at_end(
    study: "Study", session: "Session"
) -> contextlib.AbstractContextManager[None]:
    """Copy the study's journal to the mirror when the block has ended."""
    # Loads Optuna.
    from sweeps.study.mirrored import copied_at_end

    return copied_at_end(Mirror(session.common.mirror), study)


def _print_answer(folder: "Path") -> None:
    """Print the answer that the last of a session's jobs has written."""
    from optuna.trial import TrialState

    from sweeps.answer.advice import analyze
    from sweeps.answer.summary import summary_lines
    from sweeps.study.study import ANSWER

    study = load_study(folder)
    answer = read_json(folder / ANSWER)
    if answer is None or study.trials(TrialState.RUNNING):
        log.info("study %s: %s", study.name, _describe_rest(study))
        return
    report = folder / "report.html"
    shown_report = report if report.exists() else None
    lines = summary_lines(study, answer, analyze(study), shown_report)
    log.info("%s", "\n".join(lines))


class JoiningSweeper(StudySweeper):
    """Adds workers to a study that another command began: `python -m sweeps work`.

    It adds no trials and writes no answer: both are the other command's.
    """

    def sweep(self, arguments: list[str]) -> "Path":
        """Train trials until none is left to begin.

        Returns:
            The study's folder.
        """
        draft = self._draft(arguments)
        study, session = _open(draft)
        from sweeps.study.launching import run_workers

        if _has_work(study, draft):
            try:
                with _copied_at_end(study, session):
                    run_workers(study, session, waits=False)
            except StorageLost:
                raise
            except Interrupted:
                reason = "its trials are given back, and go on elsewhere"
                raise Interrupted(f"interrupted; {reason}") from None
            _explain_end(study, session)
        log.info("study %s: %s", study.name, _describe_rest(study))
        return study.folder


class QueuedSweeper(StudySweeper):
    """A session in a job of a queue, beside other jobs: the last one to end writes the answer."""

    def sweep(self, arguments: list[str]) -> "Path":
        """Begin or resume the study, and train trials until none is left to begin.

        Returns:
            The study's folder.
        """
        from optuna.trial import TrialState

        draft = self._draft(arguments)
        study, session = _open(draft)
        from sweeps.study.formatting import format_counts
        from sweeps.study.launching import run_workers
        from sweeps.study.stored_command import store_command

        store_command(study, self._config, arguments)
        _enqueue(study, draft)
        if _has_work(study, draft):
            with _copied_at_end(study, session):
                run_workers(study, session, waits=False)
            _explain_end(study, session)
        if study.trials(TrialState.RUNNING):
            log.info("study %s: %s", study.name, _describe_rest(study))
            return study.folder
        _conclude_alone(study, session)
        # Of errors, its job tells.
        _queued_study(session).tell("completed", format_counts(study))
        return study.folder


def _queued_study(session: "Session") -> QueuedStudy:
    """Return the study of a session in a queue, which tells of its end."""
    name, folder = session.settings.study_name, session.folder.absolute()
    return QueuedStudy(name, folder, session.common.notify)


def _conclude_alone(study: "Study", session: "Session") -> None:
    """Conclude; commands that share the folder end together, when the last trial has ended."""
    from sweeps.study.worker_place import remove_free_places

    with file_lock(study.folder / ".conclusion.lock"):
        try:
            _conclude(study, session)
        finally:
            # Of sessions that were killed: this one may have had no workers.
            remove_free_places(session)
            Mirror(session.common.mirror).copy(study.folder)
            Mirror.finish()


def _describe_rest(study: "Study") -> str:
    """Say what a study still has to do when a machine leaves it."""
    from optuna.trial import TrialState

    total = study.total
    finished = counted(len(study.finished()), "trial")
    of_total = "" if total is None else f" of {total}"
    running = [str(trial.number) for trial in study.trials(TrialState.RUNNING)]
    rest = f"; {', '.join(running)} running elsewhere" if running else ""
    return f"{finished}{of_total} finished, none left to begin here{rest}"


def _enqueue(study: "Study", draft: "Draft") -> None:
    """Enqueue the trials that the study lacks, and log what is left to do."""
    from sweeps.study.budget import describe_tokens
    from sweeps.study.result_values import read_config_values
    from sweeps.study.waiting import enqueue_trials
    from sweeps.study.warm_start import take_earlier_studies

    session = draft.session
    earlier = take_earlier_studies(
        study,
        session.settings,
        session.space,
        functools.partial(read_config_values, session),
    )
    enqueue_trials(
        study,
        draft.planned_total(study.added_count),
        draft.points_with(earlier),
        draft.session.settings.max_tokens,
    )
    total = study.total
    finished = len(study.finished())
    if total is None:
        plan = f"{counted(finished, 'trial')}, more until the budget is spent"
    else:
        plan = f"{max(total - finished, 0)} of {counted(total, 'trial')} to go"
    tokens = describe_tokens(study)
    if tokens:
        plan += f", {tokens}"
    n_trials = draft.session.settings.n_trials
    if n_trials is not None and total is not None and total < n_trials:
        plan += f" (the space has no more than {counted(total, 'point')}, each trained once)"
    folder = os.path.relpath(study.folder)
    log.info("study %s: %s, in %s", study.name, plan, folder)


def _has_work(study: "Study", draft: "Draft") -> bool:
    """Return whether any trial is left to train; log how the study goes on if not."""
    from optuna.trial import TrialState

    from sweeps.study.budget import describe_spent_tokens
    from sweeps.study.waiting import claimable_waiting_trials

    if study.ended:
        log.info("study %s: %s", study.name, study.ended)
        # Trials that have lost their workers are still taken on, and those added by hand.
        running = study.trials(TrialState.RUNNING)
        return bool(running or claimable_waiting_trials(study))
    finished = len(study.finished())
    spent = describe_spent_tokens(study)
    # A running trial without a worker goes on to its end.
    has_running = bool(study.trials(TrialState.RUNNING))
    total = study.total
    if total is not None and finished >= total:
        larger = finished + total - 2 * study.added_count
        advice = f"hydra.sweeper.n_trials={larger} goes on"
        if draft.is_whole_space(total):
            space = "grid" if draft.session.settings.is_grid else "space"
            advice = (
                f"every point of the {space} is tried; "
                f"another hydra.sweeper.study_name takes another {space}"
            )
        trials = counted(finished, "trial")
        log.info("study %s is full (%s): %s", study.name, trials, advice)
        return False
    if spent and not has_running:
        log.info("study %s: %s", study.name, spent)
        return False
    return True


def _explain_end(study: "Study", session: "Session") -> None:
    """Log which budget has ended the session, if one has, and how the study goes on."""
    from sweeps.study.budget import describe_spent_tokens

    spent = describe_spent_tokens(study)
    if spent:
        log.info("study %s: %s", study.name, spent)
    elif session.is_out_of_time(study):
        log.info("study %s: out of time; the same command goes on", study.name)


def _conclude(study: "Study", session: "Session") -> None:
    """Confirm the best trials if configured, and write the study's answer.

    Raises:
        Interrupted: the user interrupted the conclusion.
        NoAnswer: there is no winner, or too many trials have failed.
    """
    from optuna.trial import TrialState

    from sweeps.answer.conclusion import conclude
    from sweeps.study.adapters import remove_adapters
    from sweeps.study.session import has_failed_too_often

    folder = os.path.relpath(study.folder)
    no_answer: NoAnswer | None = None
    try:
        mirror = Mirror(session.common.mirror)
        remove_adapters(study, session.settings.keep_adapters, mirror)
        if session.settings.confirm:
            _confirm(study, session)
        conclude(study, session.common.tracker)
    except KeyboardInterrupt:
        command = f"python -m sweeps best {shlex.quote(folder)}"
        raise Interrupted(f"interrupted; {command} takes the winner") from None
    except NoAnswer as error:
        no_answer = error
    # After the answer is written: the complete trials count, though too many others failed.
    failed = study.trials(TrialState.FAIL)
    has_no_answer = bool(failed) and not study.trials(TrialState.COMPLETE)
    if has_no_answer or has_failed_too_often(study, session.settings):
        rate = f"hydra.sweeper.max_failure_rate={session.settings.max_failure_rate}"
        count = f"{len(failed)} of {len(study.finished())} trials failed"
        last = failed[-1]
        reason = last.user_attrs.get("error")
        raise NoAnswer(f"{rate}: {count}; trial {last.number}: {reason}")
    if no_answer is not None:
        raise no_answer


def _confirm(study: "Study", session: "Session") -> None:
    """Train the best trials again with other seeds, if there is time; log why not otherwise."""
    from sweeps.answer.confirm import confirm

    if session.is_out_of_time(study):
        folder = os.path.relpath(study.folder)
        log.info("out of time: not confirmed; python -m sweeps confirm %s does", folder)
        return
    if not study.ranked():
        return
    try:
        confirm(study, session.settings.confirm)
    except ConfigError as error:
        log.warning("not confirmed: %s", error)
