"""Trials as plain text, for log lines, tables on the terminal, and the report."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.metrics.names import format_metric, metric_notes
from sweeps.space.feasibility import is_feasible, violated
from sweeps.space.pruners import rung_values
from sweeps.study.inside import is_inside, point_of, values_outside
from sweeps.study.roles import GRID, role
from sweeps.study.study import Study


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns.

    Args:
        head: the column titles.
        rows: one cell for each column.

    Returns:
        One line for the head and one for each row, without a newline at the end.
    """
    table = [head, *rows]
    columns = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in table:
        cells = []
        for cell, width in zip(row, widths, strict=True):
            cells.append(cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def trials_table(study: Study, is_ranked: bool = False) -> str:
    """Format all started trials: state, objectives, parameters, and a note.

    Args:
        study: the study.
        is_ranked: whether the best trial comes first and those without a value last; otherwise
            trials are listed by number.
    """
    trials = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
    if is_ranked:
        ranked = study.ranked()
        trials = ranked + [trial for trial in trials if trial not in ranked]
    names = parameter_names(trials)
    short_names = [short_name(name) for name in names]
    head = ["trial", "state", *study.objectives, *short_names, "note"]
    rows = []
    for trial in trials:
        number = str(trial.number)
        state = trial.state.name.lower()
        objectives = objective_cells(trial, len(study.objectives))
        parameters = parameter_cells(trial, names)
        note = trial_note(trial)
        rows.append([number, state, *objectives, *parameters, note])
    notes = [*metric_notes(study.objectives), *variant_notes(study)]
    table = "\n".join([format_table(head, rows), *notes])
    waiting_count = len(study.trials()) - len(trials)
    if waiting_count:
        table += f"\n{waiting_count} waiting"
    if study.ended:
        table += f"\n{study.ended}"
    return table


def variant_notes(study: Study) -> list[str]:
    """Return a line below a table for each variant: the values that its name stands for."""
    lines = []
    for name, variants in study.variants.items():
        for variant, values in variants.items():
            assignments = [f"{key}={value}" for key, value in values.items()]
            text = " ".join(assignments) or "the config's own values"
            lines.append(f"{short_name(name)}={variant}: {text}")
    return lines


def parameter_names(trials: Iterable[FrozenTrial]) -> list[str]:
    """Return the names of all parameters that some of the trials have, in alphabetical order."""
    names: set[str] = set()
    for trial in trials:
        names |= point_of(trial).keys()
    return sorted(names)


def parameter_cells(trial: FrozenTrial, names: Sequence[str]) -> list[str]:
    """Format a trial's values of some parameters; empty where the trial has none."""
    point = point_of(trial)
    return [format_value(point.get(name, "")) for name in names]


def objective_cells(trial: FrozenTrial, count: int) -> list[str]:
    """Format a trial's objective values, padded with empty cells.

    Args:
        trial: a trial in any state. While it runs, its last reported value is shown.
        count: number of the study's objectives.

    Returns:
        `count` cells.
    """
    cells = [format_metric(value) for value in objective_values(trial)[:count]]
    padding = [""] * (count - len(cells))
    return cells + padding


def objective_values(trial: FrozenTrial) -> Sequence[float]:
    """Return a trial's objectives; of one that has not ended or was pruned, the last reported."""
    reported = rung_values(trial)
    if trial.values or not reported:
        return trial.values or []
    return reported[max(reported)]


def trial_note(trial: FrozenTrial) -> str:
    """Describe a trial's role, its place, why it ended early, and whether its batch was reduced."""
    attributes = trial.user_attrs
    # Nearly all rows of a grid would say so.
    notes = [role(trial) if role(trial) != GRID else ""]
    if not is_inside(trial):
        notes.append(f"outside the space ({', '.join(values_outside(trial))})")
    if not is_feasible(trial):
        notes.append(f"infeasible: {', '.join(violated(trial))}")
    if trial.state == TrialState.PRUNED:
        step = attributes.get("step")
        reason = attributes.get("reason", "")
        notes.append(f"at step {step}: {reason}")
    if trial.state == TrialState.FAIL:
        notes.append(str(attributes.get("error")))
    if attributes.get("shrunk"):
        notes.append("smaller batch after running out of memory")
    return "; ".join(note for note in notes if note)


def format_parameters(trial: FrozenTrial) -> str:
    """Format a trial's parameters on one line."""
    assignments = []
    for name, value in point_of(trial).items():
        assignments.append(f"{short_name(name)}={format_value(value)}")
    return " ".join(assignments)


TRIAL_NAME_LENGTH = 100
"""Characters of a trial's name in trackers; W&B takes 128."""


def trial_name(number: int, values: Mapping[str, Any]) -> str:
    """Return a trial's name in trackers: its number, and what others have other values of.

    Args:
        number: the trial's number.
        values: the values by their config keys.

    Returns:
        As `t07 r=16 learning_rate=0.0002`. A key stands in full where its last segment is that of
        another one too; what does not fit is left out.
    """
    counts = Counter(map(short_name, values))
    words = [f"t{number:02d}"]
    for key, value in values.items():
        name = short_name(key) if counts[short_name(key)] == 1 else key
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{name}={text}")
    return shorten(" ".join(words), TRIAL_NAME_LENGTH, placeholder=" …")


def short_name(name: str) -> str:
    """Return the last segment of a dotted config key."""
    return name.rsplit(".", 1)[-1]


def format_value(value: Any) -> str:
    """Format a parameter's value; floats get three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_counts(study: Study) -> str:
    """Count the complete, pruned and failed trials, and the infeasible ones among them."""
    complete = len(study.trials(TrialState.COMPLETE))
    pruned = len(study.trials(TrialState.PRUNED))
    failed = len(study.trials(TrialState.FAIL))
    infeasible = sum(not is_feasible(trial) for trial in study.trials())
    counts = f"{complete} complete, {pruned} pruned, {failed} failed"
    return f"{counts}, {infeasible} of them infeasible" if infeasible else counts
