"""The report's tables of all trials: leaderboard, time and tokens, failures."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from finetune.metrics.names import metric_notes
from finetune.quantities import format_duration
from sweeps.answer import charts
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_section import Row, Section, chart_html
from sweeps.study.formatting import (
    objective_cells,
    parameter_cells,
    parameter_names,
    short_name,
    trial_note,
    variant_notes,
)
from sweeps.study.roles import role
from sweeps.study.study import OUT_OF_TIME, Study


def leaderboard(data: ReportData) -> Section:
    """List all trials, the ranked ones first."""
    names = parameter_names(data.trials.values())
    short_names = [short_name(name) for name in names]
    head = [
        "trial",
        "state",
        *data.study.objectives,
        *short_names,
        "step",
        "tokens/s",
        "note",
    ]
    ranked = [trial.number for trial in data.study.ranked()]
    front = data.pareto_front()
    rows = []
    # Each trial once, at its first position: the ranked ones come before all in their own order.
    for number in dict.fromkeys([*ranked, *data.trials]):
        trial = data.trials[number]
        note = "on the Pareto front" if number in front else trial_note(trial)
        cells = [*_trial_cells(data, trial, names), note]
        kind = _row_kind(data, trial)
        rows.append(Row(cells, kind, folder_link(data.study, number)))
    return Section(
        "leaderboard",
        "Leaderboard",
        "; ".join([*metric_notes(data.study.objectives), *variant_notes(data.study)]),
        head=head,
        rows=rows,
        sortable=True,
    )


def folder_link(study: Study, number: int) -> str:
    """Return the address of a trial's folder, relative to the report; empty if it is not here."""
    path = study.folder_of(number).path
    if not path.is_dir():
        return ""
    return f"{path.relative_to(study.folder).as_posix()}/"


def _trial_cells(
    data: ReportData, trial: FrozenTrial, names: Sequence[str]
) -> list[str]:
    result = data.results[trial.number]
    state = trial.state.name.lower()
    objectives = objective_cells(trial, len(data.study.objectives))
    parameters = parameter_cells(trial, names)
    step = str(result.get("step", ""))
    speed = _format_speed(result.get("tokens_per_second"))
    return [str(trial.number), state, *objectives, *parameters, step, speed]


def _format_speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None or not math.isfinite(tokens_per_second):
        return ""
    return f"{tokens_per_second:.0f}"


def _row_kind(data: ReportData, trial: FrozenTrial) -> str:
    if trial == data.winner:
        return "winner"
    return "baseline" if role(trial) == "baseline" else ""


@dataclass(frozen=True)
class _Effort:
    """Training effort of a study."""

    tokens: float
    seconds: float
    """Seconds of training, summed over the trials."""


def spending(data: ReportData) -> Section:
    """Show how many tokens and how much time were spent, and what pruning saved."""
    title = "Time and tokens"
    tokens: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for number, result in data.results.items():
        tokens[number] = result.get("train_tokens") or 0
        seconds[number] = result.get("train_seconds") or 0.0
    chart = chart_html("tokens", charts.spending(data.study, tokens))
    total_tokens = sum(tokens.values())
    if not total_tokens:
        return Section("spent", title, chart=chart)
    saved = _saved_by_pruning(data.study, tokens, seconds)
    saved_share = saved.tokens / (total_tokens + saved.tokens)
    training_time = format_duration(sum(seconds.values()))
    wall_time = format_duration(_wall_time(data))
    figures = [
        (f"{total_tokens:,}", "tokens trained"),
        (training_time, "of training"),
        (wall_time, "from the first trial's start to the last one's end"),
        (f"{saved.tokens:,.0f}", "tokens saved by pruning"),
        (format_duration(saved.seconds), "of training saved"),
        (f"{saved_share:.0%}", "of all tokens saved"),
    ]
    confirmation_tokens = _confirmation_tokens(data.study)
    if confirmation_tokens:
        label = "tokens trained by the confirmation, in addition"
        figures.append((f"{confirmation_tokens:,}", label))
    return Section(
        "spent",
        title,
        figures=figures,
        chart=chart,
    )


def _saved_by_pruning(
    study: Study, tokens: Mapping[int, int], seconds: Mapping[int, float]
) -> _Effort:
    """Estimate what pruned trials would have cost from their last step to their end."""
    saved_tokens = 0.0
    saved_seconds = 0.0
    for trial in study.trials(TrialState.PRUNED):
        # The session's end stopped it, not the pruner.
        if trial.user_attrs.get("reason") == OUT_OF_TIME:
            continue
        step = trial.user_attrs.get("step")
        steps = trial.user_attrs.get("steps")
        if step and steps:
            # As a share of what the trial has cost so far.
            remaining = steps / step - 1
            saved_tokens += tokens[trial.number] * remaining
            saved_seconds += seconds[trial.number] * remaining
    return _Effort(saved_tokens, saved_seconds)


def _confirmation_tokens(study: Study) -> int:
    """Sum up the tokens that the runs of a confirmation have trained."""
    total = 0
    for path in study.folder.glob("confirm/*/result.json"):
        result = read_json(path) or {}
        total += result.get("train_tokens") or 0
    return total


def _wall_time(data: ReportData) -> float:
    """Return the seconds from the first start to the last end, 0 if no trial has ended."""
    starts = []
    ends = []
    for trial in data.trials.values():
        if trial.datetime_start:
            starts.append(trial.datetime_start)
        if trial.datetime_complete:
            ends.append(trial.datetime_complete)
    if not starts or not ends:
        return 0.0
    return (max(ends) - min(starts)).total_seconds()


def failures(data: ReportData) -> Section:
    """List the failed trials with their errors and folders."""
    rows = []
    for trial in data.study.trials(TrialState.FAIL):
        error = str(trial.user_attrs.get("error"))
        folder = data.study.folder_of(trial.number)
        path = os.path.relpath(folder.path)
        link = folder_link(data.study, trial.number)
        rows.append(Row([str(trial.number), error, path], link=link))
    head = ["trial", "reason", "folder"] if rows else ()
    return Section(
        "failures",
        "Failed trials",
        head=head,
        rows=rows,
    )
