"""Conclude a session of a study: test the winner and the baseline, write the answer, report it."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from finetune.config.sections.tracker import TrackerSettings
from finetune.console import summary_line
from finetune.errors import NoAnswer
from finetune.files.atomic import write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from finetune.run.resources import SharedResources, shared_resources
from finetune.tracking.finished import add_tag, remove_tag
from finetune.version import SCHEMA_VERSION
from sweeps.answer.advice import Analysis, analyze
from sweeps.answer.best import write_best
from sweeps.answer.commands import written_address
from sweeps.answer.final_comparison import compare_on_test_rows
from sweeps.answer.publish_hub import push_winner
from sweeps.answer.publish_wandb import publish
from sweeps.answer.report import write_report
from sweeps.answer.summary import summary_lines
from sweeps.answer.winner import find_winner, run_with_adapter
from sweeps.space.feasibility import why_no_winner
from sweeps.study.inside import first_inside, is_inside, point_of
from sweeps.study.logs import run_lines_to_files
from sweeps.study.study import ANSWER, Study

log = logging.getLogger(__name__)


def conclude(
    study: Study,
    tracker: TrackerSettings | None = None,
    resources: SharedResources = shared_resources,
) -> None:
    """Evaluate the winner and the baseline on the test rows, and write and print the answer.

    Writes `answer.json`, `best/`, `experiment/best.yaml` and `report.html`, publishes them to the
    winner's W&B run, and with `hub.push` the winner on the hub. A second session that concludes at
    the same time waits for the first.

    Args:
        study: the study.
        resources: bases and rows that are loaded already.
        tracker: what to publish to W&B; None: what the winner's config says.

    Raises:
        NoAnswer: there is no winner, or its adapter is gone.
    """
    with file_lock(study.folder / ".answer.lock"), run_lines_to_files():
        _conclude(study, resources, tracker)


def _conclude(
    study: Study, resources: SharedResources, tracker: TrackerSettings | None
) -> None:
    winner = find_winner(study)
    if winner is None:
        _report(study)
        reason = why_no_winner(study.trials())
        raise NoAnswer(f"study {study.name}: {reason}, so there is no winner")
    run = run_with_adapter(study, winner)
    if not run.adapter.is_dir():
        _report(study)
        _explain_missing_adapter(study, winner, run)
        return
    answer = _answer(study, winner, run, resources)
    # Before the report, which shows it.
    write_json(study.folder / ANSWER, answer)
    _tag_winner(study, winner)
    write_best(study, winner, run)
    analysis = analyze(study)
    report = _report(study, analysis)
    lines = summary_lines(study, answer, analysis, report)
    log.info("%s", "\n".join(lines))
    for line in publish(
        study,
        winner.number,
        answer["test"],
        report,
        tracker,
    ):
        log.info("  %s", line)
    push_winner(study)


def _explain_missing_adapter(study: Study, winner: FrozenTrial, run: RunFolder) -> None:
    """Log that another machine has the adapter. Raises NoAnswer if none does."""
    if written_address(study) is not None and not run.path.exists():
        action = "run `python -m sweeps best` on the machine that has its folder"
        log.info("study %s: trial %d wins; %s", study.name, winner.number, action)
        return
    raise NoAnswer(
        f"study {study.name}: the adapter of its winner, trial {winner.number}, "
        f"is not in {study.folder_of(winner.number).path}; best/ stays unchanged"
    )


def _answer(
    study: Study,
    winner: FrozenTrial,
    run: RunFolder,
    resources: SharedResources,
) -> dict[str, Any]:
    """Build the content of `answer.json`; this evaluates the test rows."""
    baseline = study.baseline()
    rival = baseline if baseline != winner else None
    return {
        "schema_version": SCHEMA_VERSION,
        "run": os.path.relpath(run.path, study.folder),
        **_entry(study, winner),
        "inside": _best_inside(study, winner),
        "baseline": baseline.number if baseline else None,
        "test": compare_on_test_rows(study, winner, run, rival, resources),
    }


def _entry(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "params": point_of(trial),
        "objective": dict(zip(study.objectives, trial.values, strict=True)),
    }


def _best_inside(study: Study, winner: FrozenTrial) -> dict[str, Any] | None:
    """Return the best trial inside the space; None where that is the winner, or there is none."""
    if is_inside(winner):
        return None
    inside = first_inside(study.ranked())
    return _entry(study, inside) if inside else None


def _tag_winner(study: Study, winner: FrozenTrial) -> None:
    """Give the winner's W&B run the tag `best`, and no other run.

    Trials get the tag as they end: two that end together may both have it, and a confirmation may
    choose another winner.
    """
    for trial in study.finished():
        if trial.number != winner.number:
            remove_tag(study.folder_of(trial.number), "best")
    if len(study.objectives) == 1:
        add_tag(study.folder_of(winner.number), "best")


def _report(study: Study, analysis: Analysis | None = None) -> Path | None:
    """Write the report; a report that fails must not cost the study its answer."""
    try:
        return write_report(study, analysis=analysis)
    except Exception as error:
        folder = shlex.quote(os.path.relpath(study.folder))
        log.warning(
            "no report: %s; HYDRA_FULL_ERROR=1 python -m sweeps report %s shows where",
            summary_line(error),
            folder,
        )
        return None
