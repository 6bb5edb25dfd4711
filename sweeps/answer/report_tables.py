"""The report's tables of all trials: leaderboard, time and tokens, failures."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from sweeps.answer import charts
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_section import Row, Section, chart_html
from sweeps.study.formatting import format_value, objective_cells, short_name, trial_note
from sweeps.study.study import OUT_OF_TIME, Study, role


def leaderboard(data: ReportData) -> Section:
    """List all trials, the ranked ones first."""
    names = sorted({name for trial in data.trials.values() for name in trial.params})
    columns = [*data.study.objectives, *map(short_name, names)]
    ranked = [trial.number for trial in data.study.ranked()]
    front = data.pareto_front()
    rows = []
    for number in dict.fromkeys([*ranked, *data.trials]):
        trial = data.trials[number]
        note = "on the Pareto front" if number in front else trial_note(trial)
        cells = [*_trial_cells(data, trial, names), note]
        rows.append(Row(cells, _row_kind(data, trial)))
    head = ["trial", "state", *columns, "step", "tokens/s", "note"]
    return Section("leaderboard", "Leaderboard", head=head, rows=rows, sortable=True)


def _trial_cells(data: ReportData, trial: FrozenTrial, names: list[str]) -> list[str]:
    result = data.results[trial.number]
    return [
        str(trial.number),
        trial.state.name.lower(),
        *objective_cells(trial, len(data.study.objectives)),
        *(format_value(trial.params.get(name, "")) for name in names),
        str(result.get("step", "")),
        _format_speed(result.get("tokens_per_second")),
    ]


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


def spending(data: ReportData) -> Section:
    """Show how many tokens and how much time were spent, and what pruning saved."""
    title = "Time and tokens"
    tokens = {n: result.get("train_tokens") or 0 for n, result in data.results.items()}
    seconds = {n: result.get("train_seconds") or 0.0 for n, result in data.results.items()}
    chart = chart_html("tokens", charts.spending(data.study, tokens))
    spent = sum(tokens.values())
    if not spent:
        return Section("spent", title, chart=chart)
    saved = _saved_by_pruning(data.study, tokens, seconds)
    figures = [
        (f"{spent:,}", "tokens trained"),
        (_format_duration(sum(seconds.values())), "of training"),
        (_format_duration(_wall_time(data)), "from the first trial's start to the last one's end"),
        (f"{saved.tokens:,.0f}", "tokens saved by pruning"),
        (_format_duration(saved.seconds), "of training saved"),
        (f"{saved.tokens / (spent + saved.tokens):.0%}", "of all tokens saved"),
    ]
    confirmation_tokens = _confirmation_tokens(data.study)
    if confirmation_tokens:
        label = "tokens trained by the confirmation, in addition"
        figures.append((f"{confirmation_tokens:,}", label))
    return Section("spent", title, figures=figures, chart=chart)


def _saved_by_pruning(
    study: Study, tokens: Mapping[int, int], seconds: Mapping[int, float]
) -> _Effort:
    """Estimate what pruned trials would have cost from their last step to their end."""
    saved_tokens, saved_seconds = 0.0, 0.0
    for trial in study.trials(TrialState.PRUNED):
        step, steps = trial.user_attrs.get("step"), trial.user_attrs.get("steps")
        if trial.user_attrs.get("reason") != OUT_OF_TIME and step and steps:
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
    starts = [trial.datetime_start for trial in data.trials.values() if trial.datetime_start]
    ends = [trial.datetime_complete for trial in data.trials.values() if trial.datetime_complete]
    return (max(ends) - min(starts)).total_seconds() if starts and ends else 0.0


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def failures(data: ReportData) -> Section:
    """List the failed trials with their errors and folders."""
    rows = []
    for trial in data.study.trials(TrialState.FAIL):
        folder = os.path.relpath(data.study.folder_of(trial.number).path)
        rows.append(Row([str(trial.number), str(trial.user_attrs.get("error")), folder]))
    head = ["trial", "reason", "folder"] if rows else ()
    return Section("failures", "Failed trials", head=head, rows=rows)
