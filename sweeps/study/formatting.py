"""Studies as plain text: what the terminal, `python -m sweeps` and the report say in the same words."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.study.storage import JOURNAL
from sweeps.study.study import Study, role


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def trials_table(study: Study) -> str:
    """All trials of a study that have begun: state, objective, parameters, and why they ended."""
    trials = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
    names = sorted({name for trial in trials for name in trial.params})
    head = ["trial", "state", *study.objectives, *(short_name(name) for name in names), "note"]
    rows = [
        [
            str(trial.number),
            trial.state.name.lower(),
            *objective_cells(trial, len(study.objectives)),
            *(format_value(trial.params.get(name, "")) for name in names),
            trial_note(trial),
        ]
        for trial in trials
    ]
    waiting = len(study.trials()) - len(trials)
    return format_table(head, rows) + (f"\n{waiting} more to go" if waiting else "")


def objective_cells(trial: FrozenTrial, count: int) -> list[str]:
    """A trial's values; of one that is still running its last rung's, if there is one objective."""
    values = trial.values or ([trial.intermediate_values[trial.last_step]] if trial.last_step is not None else [])
    return [f"{value:.4f}" for value in values[:count]] + [""] * (count - len(values))


def trial_note(trial: FrozenTrial) -> str:
    """What else there is to say of a trial."""
    attributes = trial.user_attrs
    notes = [role(trial)]
    if trial.state == TrialState.PRUNED:
        notes.append(f"at step {attributes.get('step')}: {attributes.get('reason', '')}")
    if trial.state == TrialState.FAIL:
        notes.append(str(attributes.get("error")))
    if attributes.get("shrunk"):
        notes.append("a smaller batch: out of memory")
    return "; ".join(note for note in notes if note)


def parameters(trial: FrozenTrial) -> str:
    """A trial's point on one line."""
    return " ".join(f"{short_name(name)}={format_value(value)}" for name, value in trial.params.items())


def short_name(name: str) -> str:
    """A parameter's last word."""
    return name.rsplit(".", 1)[-1]


def format_value(value: Any) -> str:
    """A parameter's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def counts(study: Study) -> str:
    """How the trials have ended."""
    states = ((TrialState.COMPLETE, "complete"), (TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed"))
    return ", ".join(f"{len(study.trials(state))} {word}" for state, word in states)


def test_lines(answer: Mapping[str, Any]) -> list[str]:
    """The last word on winner and baseline: their losses on the test rows, and how sure the difference is."""
    test = answer["test"]
    if test is None:
        return []
    rows = f"on {test['rows']} rows that no choice has seen"
    if "difference" not in test:
        same = ": the baseline itself" if answer["baseline"] == answer["trial"] else ""
        return [f"{test['winner']:.4f} {rows}{same}"]
    low, high = test["interval_95"]
    return [
        f"{test['winner']:.4f}, baseline {test['baseline']:.4f} {rows}",
        f"{test['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {test['verdict']}",
    ]


def confirmation_lines(found: Mapping[str, Any]) -> list[str]:
    """What training anew with other seeds has shown."""
    lines = []
    for row in found["candidates"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
        mean = "no run came to its end" if row["mean"] is None else f"{row['mean']:.4f}{spread}"
        notes = [row["role"], f"{len(row['failed'])} failed: {row['failed'][0]}" if row["failed"] else ""]
        noted = "".join(f"  {note}" for note in notes if note)
        lines.append(f"trial {row['trial']}: {found['objective']} {mean} with {len(row['values'])} other seeds{noted}")
    for pair in found["comparisons"]:
        interval = f"test loss {pair['difference']:+.4f}, 95 % interval {pair['low']:+.4f} to {pair['high']:+.4f}"
        lines.append(
            f"trial {pair['trial']} against trial {pair['other']}: {interval} on {pair['rows']} test rows; "
            f"better with a chance of {_chance(pair['chance'])}"
        )
    now, before = found["winner"], found["before"]
    first = next(row for row in found["candidates"] if row["trial"] == before)
    if now != before and first["failed"]:
        lines.append(f"not every run of trial {before}, the study's best, came to its end: trial {now} is the answer")
    elif now != before:
        lines.append(f"trial {now} is better on average than trial {before}, the study's best: it is the answer")
    return lines


def _chance(share: float) -> str:
    """Nothing that was measured is certain."""
    return "more than 99%" if share > 0.99 else "less than 1%" if share < 0.01 else f"{share:.0%}"


def commands(study: Study) -> list[tuple[str, str]]:
    """What to do with a study's winner, and where to look at all trials: what for, and the command."""
    place = shlex.quote(os.path.relpath(study.folder))
    merged = shlex.quote(os.path.relpath(study.folder / "merged"))
    found = [
        ("use it", f'python -m finetune.generate {place}/best --prompt "…"'),
        ("run it again", f"python -m finetune --config-dir {place} experiment=best"),
        *(
            [("confirm it", f"python -m sweeps confirm {place} --top 3 --seeds 5")]
            if len(study.objectives) == 1
            else []
        ),
        ("merge it", f"python -m finetune.merge {place}/best --to {merged}"),
        ("serve it", f"vllm serve {merged}"),
        ("push it", f"hf upload YOU/{study.name} {place}/best/adapter"),
        ("look at all", f"optuna-dashboard {_storage(study)}"),
    ]
    runs = [f"{part}/*/wandb/offline-run-*" for part in ("trials", "confirm")]
    offline = [f"{place}/{pattern}" for pattern in runs if any(study.folder.glob(pattern))]
    return [*found, *([("W&B", f"wandb sync {' '.join(offline)}")] if offline else [])]


def _storage(study: Study) -> str:
    """The study's storage as a shell has it."""
    address = study.written_address
    if address is None:
        return shlex.quote(os.path.relpath(study.folder / JOURNAL))
    return '"' + re.sub(r"\$\{oc\.env:(\w+)[^}]*\}", r"$\1", address) + '"'
