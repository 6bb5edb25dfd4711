"""The Hydra sweeper `hydra/sweeper=optuna`: begins or resumes a study, runs workers, concludes.

Registered as a plugin by the package's entry point, so Hydra imports it at every start: everything
heavy is imported when a sweep begins.
"""

import dataclasses
import logging
import os
import shlex
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

from finetune.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from sweeps.study.draft import Draft
    from sweeps.study.session import Session
    from sweeps.study.study import Study

log = logging.getLogger(__name__)


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

    def sweep(self, arguments: list[str]) -> None:
        """Run one session: until the study has its trials, is out of time, or is interrupted."""
        from sweeps.study.draft import draft_session

        # Hydra's lines on each launch and job would stand between those of the study.
        for library in ("hydra", "hydra_plugins"):
            logging.getLogger(library).setLevel(logging.WARNING)
        draft = draft_session(
            self._config, self._hydra_context, self._values, arguments
        )

        # After the checks, because these modules load torch.
        from sweeps.study.launching import run_workers
        from sweeps.study.opening import open_study

        study, session = open_study(draft.session)
        if session.settings.stop_when == "no_gain":
            from sweeps.answer.more_trials import no_gain

            session = dataclasses.replace(session, end_rule=no_gain)
        if _enqueue(study, draft):
            run_workers(study, session, draft.total)
        _conclude(study, session)


def _enqueue(study: "Study", draft: "Draft") -> bool:
    """Enqueue the trials that the study lacks; return whether any is left to train."""
    from optuna.trial import TrialState

    from sweeps.study.claims import enqueue_trials

    total = draft.total
    unfinished = enqueue_trials(study, total, draft.points)
    log.info(
        "study %s: %d of %d trials to go, in %s",
        study.name,
        max(unfinished, 0),
        total,
        os.path.relpath(study.folder),
    )
    if study.ended:
        log.info("study %s: %s", study.name, study.ended)
        # Trials that have lost their workers are still taken on.
        return bool(study.trials(TrialState.RUNNING))
    if unfinished > 0:
        return True
    finished = len(study.finished())
    if draft.is_whole_grid:
        advice = (
            "every point of the grid is tried; "
            "another hydra.sweeper.study_name takes another grid"
        )
    else:
        advice = f"hydra.sweeper.n_trials={finished + total} goes on"
    log.info("study %s is full (%d trials): %s", study.name, finished, advice)
    return False


def _conclude(study: "Study", session: "Session") -> None:
    """Confirm the best trials if configured, and write the study's answer.

    Raises:
        Interrupted: the user interrupted the conclusion.
        ConfigError: too many trials have failed.
    """
    from optuna.trial import TrialState

    from sweeps.answer.conclusion import conclude
    from sweeps.study.session import has_failed_too_often

    folder = os.path.relpath(study.folder)
    try:
        study.remove_adapters(session.settings.keep_adapters)
        if session.settings.confirm:
            _confirm(study, session)
        conclude(study, session.common.tracker)
    except KeyboardInterrupt:
        command = f"python -m sweeps best {shlex.quote(folder)}"
        raise Interrupted(f"interrupted; {command} takes the winner") from None
    # After the answer is written: the complete trials count, though too many others failed.
    failed = study.trials(TrialState.FAIL)
    has_no_answer = bool(failed) and not study.ranked()
    if has_no_answer or has_failed_too_often(study, session.settings):
        rate = f"hydra.sweeper.max_failure_rate={session.settings.max_failure_rate}"
        count = f"{len(failed)} of {len(study.finished())} trials failed"
        last = failed[-1]
        error = last.user_attrs.get("error")
        raise ConfigError(f"{rate}: {count}; trial {last.number}: {error}")


def _confirm(study: "Study", session: "Session") -> None:
    """Train the best trials again with other seeds, if there is time; log why not otherwise."""
    from sweeps.answer.confirm import confirm

    if session.is_out_of_time:
        folder = os.path.relpath(study.folder)
        log.info("out of time: not confirmed; python -m sweeps confirm %s does", folder)
        return
    if not study.ranked():
        return
    try:
        confirm(study, session.settings.confirm)
    except ConfigError as error:
        log.warning("not confirmed: %s", error)
