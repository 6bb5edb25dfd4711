"""Format studies as plain text for the terminal, `python -m sweeps` and the report."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.study.storage import JOURNAL
from sweeps.study.study import Study, role


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns.

    Args:
        head: the column titles.
        rows: one cell for each column.

    Returns:
        One line for the head and one for each row, without a newline at the end.
    """
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def trials_table(study: Study) -> str:
    """Format all started trials: state, objectives, parameters, and a note."""
    trials = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
    names = sorted({name for trial in trials for name in trial.params})
    head = ["trial", "state", *study.objectives, *map(short_name, names), "note"]
    rows = []
    for trial in trials:
        objectives = objective_cells(trial, len(study.objectives))
        values = [format_value(trial.params.get(name, "")) for name in names]
        state = trial.state.name.lower()
        rows.append([str(trial.number), state, *objectives, *values, trial_note(trial)])
    table = format_table(head, rows)
    waiting_count = len(study.trials()) - len(trials)
    return f"{table}\n{waiting_count} waiting" if waiting_count else table


def objective_cells(trial: FrozenTrial, count: int) -> list[str]:
    """Format a trial's objective values, padded with empty cells.

    Args:
        trial: a trial in any state. While it runs, its last reported value is shown.
        count: number of the study's objectives.

    Returns:
        `count` cells.
    """
    values: Sequence[float] = trial.values or []
    if not values and trial.last_step is not None:
        values = [trial.intermediate_values[trial.last_step]]
    return [f"{value:.4f}" for value in values[:count]] + [""] * (count - len(values))


def trial_note(trial: FrozenTrial) -> str:
    """Describe a trial's role, why it ended early, and whether its batch was reduced."""
    attributes = trial.user_attrs
    notes = [role(trial)]
    if trial.state == TrialState.PRUNED:
        notes.append(f"at step {attributes.get('step')}: {attributes.get('reason', '')}")
    if trial.state == TrialState.FAIL:
        notes.append(str(attributes.get("error")))
    if attributes.get("shrunk"):
        notes.append("smaller batch after running out of memory")
    return "; ".join(note for note in notes if note)


def format_parameters(trial: FrozenTrial) -> str:
    """Format a trial's parameters on one line."""
    return " ".join(
        f"{short_name(name)}={format_value(value)}" for name, value in trial.params.items()
    )


def short_name(name: str) -> str:
    """Return the last segment of a dotted config key."""
    return name.rsplit(".", 1)[-1]


def format_value(value: Any) -> str:
    """Format a parameter's value; floats get three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_counts(study: Study) -> str:
    """Count the complete, pruned and failed trials."""
    complete = len(study.trials(TrialState.COMPLETE))
    pruned = len(study.trials(TrialState.PRUNED))
    failed = len(study.trials(TrialState.FAIL))
    return f"{complete} complete, {pruned} pruned, {failed} failed"


def test_loss_lines(answer: Mapping[str, Any]) -> list[str]:
    """Describe the test losses of the winner and the baseline.

    Args:
        answer: the content of `answer.json`.

    Returns:
        A line with the losses (nats per token), and one with their difference and its confidence
        interval if there is a baseline to compare with. Empty without test rows.
    """
    test = answer["test"]
    if test is None:
        return []
    rows = f"on {test['rows']} test rows that no decision has used"
    if "difference" in test:
        low, high = test["interval_95"]
        interval = f"95 % interval {low:+.4f} to {high:+.4f}"
        return [
            f"{test['winner']:.4f}, baseline {test['baseline']:.4f} {rows}",
            f"{test['difference']:+.4f}, {interval}: {test['verdict']}",
        ]
    if answer["baseline"] == answer["trial"]:
        return [f"{test['winner']:.4f} {rows}: the winner is the baseline itself"]
    return [f"{test['winner']:.4f} {rows}"]


def confirmation_lines(confirmation: Mapping[str, Any]) -> list[str]:
    """Describe a confirmation.

    Args:
        confirmation: the content of `confirm.json`.

    Returns:
        A line for each retrained trial, one for each comparison with the winner on the test rows,
        and one if the winner is another trial than before.
    """
    objective = confirmation["objective"]
    return [
        *(_candidate_line(candidate, objective) for candidate in confirmation["candidates"]),
        *(_comparison_line(comparison) for comparison in confirmation["comparisons"]),
        *_winner_change_lines(confirmation),
    ]


def _candidate_line(candidate: Mapping[str, Any], objective: str) -> str:
    count = len(candidate["values"])
    failures = candidate["failed"]
    if candidate["mean"] is None:
        line = f"trial {candidate['trial']}: {objective}: no run completed"
    else:
        spread = "" if candidate["spread"] is None else f" ± {candidate['spread']:.4f}"
        seeds = "1 other seed" if count == 1 else f"{count} other seeds"
        line = (
            f"trial {candidate['trial']}: {objective} {candidate['mean']:.4f}{spread} with {seeds}"
        )
    if candidate["role"]:
        line += f"  {candidate['role']}"
    if failures:
        line += f"  {len(failures)} failed: {failures[0]}"
    return line


def _comparison_line(comparison: Mapping[str, Any]) -> str:
    """Describe the winner's test loss minus another candidate's."""
    difference = f"{comparison['difference']:+.4f}"
    interval = f"95 % interval {comparison['low']:+.4f} to {comparison['high']:+.4f}"
    return (
        f"trial {comparison['trial']} compared with trial {comparison['other']}: "
        f"test loss {difference}, {interval} on {comparison['rows']} test rows; "
        f"better with a probability of {_format_probability(comparison['chance'])}"
    )


def _format_probability(share: float) -> str:
    """Format a share of resamples; never as 0 % or 100 %, which resamples cannot prove."""
    if share > 0.99:
        return "more than 99%"
    if share < 0.01:
        return "less than 1%"
    return f"{share:.0%}"


def _winner_change_lines(confirmation: Mapping[str, Any]) -> list[str]:
    """Say why the confirmed winner is not the study's best trial, if it is not."""
    best, winner = confirmation["before"], confirmation["winner"]
    if winner == best:
        return []
    candidates = {candidate["trial"]: candidate for candidate in confirmation["candidates"]}
    if candidates[best]["failed"]:
        return [f"trial {best}, the study's best, has failed runs: trial {winner} is the winner"]
    return [
        f"trial {winner} has a better mean than trial {best}, the study's best: it is the winner"
    ]


def commands(study: Study) -> list[tuple[str, str]]:
    """List shell commands that use a study's winner or show its trials.

    Returns:
        Pairs of a short purpose and a command, for the current working directory.
    """
    folder = shlex.quote(os.path.relpath(study.folder))
    merged = shlex.quote(os.path.relpath(study.folder / "merged"))
    pairs = [
        ("generate", f'python -m finetune.generate {folder}/best --prompt "…"'),
        ("train again", f"python -m finetune --config-dir {folder} experiment=best"),
    ]
    if len(study.objectives) == 1:
        pairs.append(("confirm", f"python -m sweeps confirm {folder} --top 3 --seeds 5"))
    pairs += [
        ("merge", f"python -m finetune.merge {folder}/best --to {merged}"),
        ("serve", f"vllm serve {merged}"),
        ("upload", f"hf upload YOU/{study.name} {folder}/best/adapter"),
        ("dashboard", f"optuna-dashboard {_shell_storage(study)}"),
    ]
    offline_runs = []
    for runs in ("trials", "confirm"):
        pattern = f"{runs}/*/wandb/offline-run-*"
        if any(study.folder.glob(pattern)):
            offline_runs.append(f"{folder}/{pattern}")
    if offline_runs:
        pairs.append(("W&B", f"wandb sync {' '.join(offline_runs)}"))
    return pairs


def _shell_storage(study: Study) -> str:
    """Format the study's storage as a shell word; secrets stay environment variables."""
    address = study.written_address
    if address is None:
        return shlex.quote(os.path.relpath(study.folder / JOURNAL))
    return '"' + re.sub(r"\$\{oc\.env:(\w+)[^}]*\}", r"$\1", address) + '"'
