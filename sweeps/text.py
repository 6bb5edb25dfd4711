"""Studies as plain text: one table of trials for the terminal and for `python -m sweeps`."""

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.study import Study, role


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def trials_table(study: Study) -> str:
    """All trials of a study that have begun: state, objective, parameters, and why they ended."""
    trials = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
    names = sorted({name for trial in trials for name in trial.params})
    head = ["trial", "state", *study.objectives, *(short(name) for name in names), "note"]
    rows = [
        [
            str(trial.number),
            trial.state.name.lower(),
            *objective_cells(trial, len(study.objectives)),
            *(shown(trial.params.get(name, "")) for name in names),
            note(trial),
        ]
        for trial in trials
    ]
    waiting = len(study.trials()) - len(trials)
    return table(head, rows) + (f"\n{waiting} more to go" if waiting else "")


def objective_cells(trial: FrozenTrial, count: int) -> list[str]:
    """A trial's values; of one that is still running its last rung's, if there is one objective."""
    values = trial.values or ([trial.intermediate_values[trial.last_step]] if trial.last_step is not None else [])
    return [f"{value:.4f}" for value in values[:count]] + [""] * (count - len(values))


def note(trial: FrozenTrial) -> str:
    """What else there is to say of a trial."""
    attributes = trial.user_attrs
    notes = [role(trial)]
    if trial.state == TrialState.PRUNED:
        notes.append(f"at step {attributes.get('step')}: {attributes.get('reason', '')}")
    if trial.state == TrialState.FAIL:
        notes.append(str(attributes.get("error")))
    if attributes.get("shrunk"):
        notes.append("batch halved: out of memory")
    return "; ".join(note for note in notes if note)


def parameters(trial: FrozenTrial) -> str:
    """A trial's point on one line."""
    return " ".join(f"{short(name)}={shown(value)}" for name, value in trial.params.items())


def short(name: str) -> str:
    """A parameter's last word."""
    return name.rsplit(".", 1)[-1]


def shown(value: Any) -> str:
    """A parameter's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
