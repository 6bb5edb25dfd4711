"""The summary that a study prints at the end of a session."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.metrics.names import describe_metric, format_metric, metric_notes
from sweeps.answer.advice import Analysis
from sweeps.answer.commands import commands
from sweeps.answer.confirmation import read_confirmation
from sweeps.answer.descriptions import confirmation_lines, final_comparison_lines
from sweeps.answer.importance import describe_importance
from sweeps.space.feasibility import is_feasible, violated
from sweeps.study.formatting import (
    format_counts,
    format_parameters,
    variant_notes,
)
from sweeps.study.inside import is_inside, values_outside
from sweeps.study.roles import role
from sweeps.study.study import Study

SHOWN_TRIALS = 5
"""Number of best trials that are listed, or the whole front; the baseline is always added."""


def summary_lines(
    study: Study,
    answer: Mapping[str, Any],
    analysis: Analysis,
    report: Path | None,
) -> list[str]:
    """Format the end of a study.

    Args:
        study: the study.
        answer: the content of `answer.json`.
        analysis: the analysis of the study's trials.
        report: path of the report, if it was written.

    Returns:
        Lines for the terminal.
    """
    confirmation = read_confirmation(study)
    lines = [f"study {study.name}: {format_counts(study)}"]
    lines += _trial_lines(study)
    lines += _labelled("infeasible", _infeasible_lines(study))
    lines += _labelled("importance", [describe_importance(analysis.importance)])
    lines += _labelled("test rows", final_comparison_lines(answer))
    if confirmation is not None:
        lines += _labelled("confirmed", confirmation_lines(confirmation))
    lines += _labelled("advice", analysis.advice)
    for trial in study.trials(TrialState.FAIL):
        error = trial.user_attrs.get("error")
        lines.append(f"  trial {trial.number:<4} failed: {error}")
    lines += _labelled("winner", [_winner(study, answer)])
    lines += _labelled("best inside", _inside_lines(study, answer))
    for purpose, command in commands(study):
        lines += _labelled(purpose, [command])
    if report is not None:
        path = shlex.quote(os.path.relpath(report))
        lines += _labelled("report", [path])
    return lines


def _trial_lines(study: Study) -> list[str]:
    """Describe the best trials and the baseline."""
    front = set()
    if len(study.objectives) > 1:
        front = {trial.number for trial in study.optuna.best_trials}
    shown = study.ranked()[: max(SHOWN_TRIALS, len(front))]
    baseline = study.baseline()
    if baseline is not None and baseline not in shown:
        shown.append(baseline)
    lines = [_trial_line(study, trial, trial.number in front) for trial in shown]
    notes = [*metric_notes(study.objectives), *variant_notes(study)]
    return lines + [f"  {note}" for note in notes]


def _infeasible_lines(study: Study) -> list[str]:
    """Name the trials that violate each constraint."""
    numbers: dict[str, list[str]] = {}
    for trial in study.trials():
        for name in violated(trial):
            numbers.setdefault(name, []).append(str(trial.number))
    return [f"trials {', '.join(each)}: not {name}" for name, each in numbers.items()]


def _trial_line(study: Study, trial: FrozenTrial, is_on_front: bool) -> str:
    objectives = []
    for name, value in zip(study.objectives, trial.values, strict=True):
        objectives.append(f"{name} {format_metric(value)}")
    values = "  ".join(objectives)
    line = f"  trial {trial.number:<4} {values}  {format_parameters(trial)}"
    if role(trial) == "baseline":
        line += "  baseline"
    if not is_feasible(trial):
        line += "  infeasible"
    if is_on_front:
        line += "  (on the Pareto front)"
    return line


def _winner(study: Study, answer: Mapping[str, Any]) -> str:
    """Say where the winner is, and which run it comes from."""
    folder = shlex.quote(os.path.relpath(study.folder))
    number = answer["trial"]
    if answer["run"] == f"trials/{number}":
        return f"{folder}/best: the run folder of trial {number}"
    source = f"retrained in {answer['run']}, because its first adapter was removed"
    return f"{folder}/best: trial {number}, {source}"


def _inside_lines(study: Study, answer: Mapping[str, Any]) -> list[str]:
    """Name the best trial inside the space where the winner lies outside."""
    trials = {trial.number: trial for trial in study.ranked()}
    winner = trials[answer["trial"]]
    if is_inside(winner):
        return []
    names = ", ".join(values_outside(winner))
    reason = f"trial {winner.number} lies outside the search space: {names}"
    if answer.get("inside") is None:
        return [f"no trial is complete there; {reason}"]
    inside = trials[answer["inside"]["trial"]]
    values = [
        f"{describe_metric(name)} {format_metric(value)}"
        for name, value in zip(study.objectives, inside.values, strict=True)
    ]
    return [f"trial {inside.number}, {', '.join(values)}; {reason}"]


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Put a label before the first line, and indent the others under it."""
    labelled = []
    for index, line in enumerate(lines):
        shown_label = label if index == 0 else ""
        labelled.append(f"  {shown_label:14} {line}")
    return labelled
