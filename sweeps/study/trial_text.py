"""One trial in full, and what two trials differ in, as plain text."""

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from finetune.config.flatten import flatten
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from sweeps.study.formatting import format_table, format_value, trial_note
from sweeps.study.inside import point_of
from sweeps.study.study import Study

_RESULTS = (
    "step",
    "effective_batch_size",
    "train_tokens",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "engine",
    "error",
)
"""Entries of `result.json` that are shown beside the metrics."""


def trial_text(study: Study, number: int) -> str:
    """Format a trial: its state, its parameters, its metrics, what it took, and its folder.

    Raises:
        ConfigError: the study has no such trial.
    """
    trial = find_trial(study, number)
    folder = study.folder_of(number)
    facts = {
        "state": trial.state.name.lower(),
        "note": trial_note(trial),
        **point_of(trial),
    }
    facts |= _results(folder)
    facts["folder"] = folder.path.relative_to(study.folder)
    rows = [[name, format_value(value)] for name, value in facts.items() if value != ""]
    return format_table(["trial", str(number)], rows)


def difference_text(study: Study, numbers: Sequence[int]) -> str:
    """Format what trials differ in: keys of their configs, then their results.

    Raises:
        ConfigError: see `differences`.
    """
    rows = []
    for name, values in differences(study, numbers).items():
        rows.append([name, *map(format_value, values)])
    return format_table(["trial", *map(str, numbers)], rows)


def differences(
    study: Study, numbers: Sequence[int], formatted: bool = True
) -> dict[str, list[Any]]:
    """Return what trials differ in: keys of their configs, then their results.

    Args:
        study: the study.
        numbers: the trials.
        formatted: whether metrics are rounded texts; otherwise they are numbers.

    Returns:
        The value of each trial, by the key; `""` where a trial has none.

    Raises:
        ConfigError: the study has no such trial, or one has not begun.
    """
    sides = []
    for number in numbers:
        trial = find_trial(study, number)
        folder = study.folder_of(number)
        identity = read_json(folder.identity)
        if identity is None:
            raise ConfigError(
                f"trial {number}: has no run.json: it has not begun a run here"
            )
        config = flatten(identity["config"])
        results = _results(folder, formatted)
        sides.append({**config, "state": trial.state.name.lower(), **results})
    # A dict in place of a set, to keep the order.
    names = dict.fromkeys(name for side in sides for name in side)
    differing = {}
    for name in names:
        values = [side.get(name, "") for side in sides]
        if any(value != values[0] for value in values):
            differing[name] = values
    return differing


def find_trial(study: Study, number: int) -> FrozenTrial:
    """Return the trial of a number. Raises ConfigError where the study has none."""
    trials = {trial.number: trial for trial in study.trials()}
    if number not in trials:
        allowed = f"0 to {max(trials)}" if trials else "none yet"
        raise ConfigError(f"trial {number}: no such trial; allowed: {allowed}")
    return trials[number]


def _results(folder: RunFolder, formatted: bool = True) -> dict[str, Any]:
    """Return a run's final metrics and what it took.

    Args:
        folder: the run's folder.
        formatted: whether metrics are rounded texts.
    """
    result = read_json(folder.result) or {}
    facts: dict[str, Any] = {}
    for name, value in (result.get("metrics") or {}).items():
        if formatted and value is not None:
            value = f"{value:.4f}"
        facts[name] = "" if value is None else value
    for name in _RESULTS:
        if result.get(name) is not None:
            facts[name] = result[name]
    return facts
