"""The folder of a plain multirun, read as a study: its jobs are the trials.

So commands on studies show it, and the report draws its charts. Nothing of it is stored: each run
folder says how its job ended, and its overrides say what it varies.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from finetune.config.schema import RunConfig
from finetune.errors import NoAnswer
from finetune.files.atomic import read_json, write_text
from finetune.files.run_folder import RunFolder, refused_jobs
from finetune.metrics.load import higher_is_better, load_metrics
from finetune.run.load import read_run_config
from sweeps.study.formatting import trials_table
from sweeps.study.in_memory import study_in_memory
from sweeps.study.roles import GRID
from sweeps.study.study import Study

TABLE = "jobs.txt"
"""The table of all jobs, in the multirun's folder."""

_STATES = {
    "completed": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "interrupted": TrialState.FAIL,
}
"""States of a job by its `status`; without a result it is running, or was killed."""

Value = int | float | str


def differing_values(jobs: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """Return the keys and values of each job's overrides in which the jobs differ."""
    assignments = []
    for overrides in jobs:
        pairs = (override.partition("=") for override in overrides)
        assignments.append({key.lstrip("+"): value for key, _, value in pairs})
    first = assignments[0] if assignments else {}
    common = {
        key
        for key, value in first.items()
        if all(job.get(key) == value for job in assignments)
    }
    return [
        {key: value for key, value in job.items() if key not in common}
        for job in assignments
    ]


def describe_values(values: Mapping[str, str]) -> str:
    """Return what a job varies as it stands on the command line."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def write_table(folder: Path) -> str:
    """Write the table of a multirun's jobs, the best first, into its folder, and return it.

    Raises:
        NoAnswer: no job has begun.
    """
    table = trials_table(read_multirun(folder), is_ranked=True)
    write_text(folder / TABLE, f"{table}\n")
    return table


def read_multirun(folder: Path) -> Study:
    """Read the jobs of a plain multirun as the trials of a study in memory.

    Raises:
        NoAnswer: no job has begun.
    """
    refused = refused_jobs(folder)
    runs = {}
    for path in (folder / "trials").glob("*"):
        run = RunFolder(path)
        # A refused job's folder stays where it is the working directory.
        has_begun = path.name not in map(str, refused) or run.identity.exists()
        if path.name.isdigit() and has_begun:
            runs[int(path.name)] = run
    config = _common_config(folder, list(runs.values()))
    numbers = range(max([*runs, *refused]) + 1)
    varied = dict(
        zip(
            runs,
            differing_values([_overrides(run) for run in runs.values()]),
            strict=True,
        )
    )
    choices = _choices(varied)
    trials = []
    for number in numbers:
        if number in runs:
            trials.append(
                _trial(number, runs[number], varied[number], choices, config.objectives)
            )
        else:
            trials.append(_refused(number, refused.get(number)))
    metrics = load_metrics(config.evaluation)
    directions = []
    for objective in config.objectives:
        rises = higher_is_better(objective, metrics)
        directions.append(StudyDirection.MAXIMIZE if rises else StudyDirection.MINIMIZE)
    attributes = {"terms": {"objective": list(config.objectives)}, "total": len(trials)}
    return study_in_memory(folder, folder.name, directions, attributes, trials)


def is_multirun(study: Study) -> bool:
    """Return whether a study is a plain multirun, as `read_multirun` reads it."""
    return isinstance(study.storage, InMemoryStorage)


def _common_config(folder: Path, runs: Sequence[RunFolder]) -> RunConfig:
    """Return the config of a completed job, else of any that has begun. It has all jobs' objective.

    Raises:
        NoAnswer: no job has begun.
    """
    begun = [run for run in runs if run.identity.exists()]
    for run in begun:
        recorded = read_json(run.result) or {}
        if recorded.get("status") == "completed" and recorded["objective"]:
            return read_run_config(run.path)
    if not begun:
        raise NoAnswer(f"{folder}: no job of this multirun has begun to train yet")
    return read_run_config(begun[0].path)


def _overrides(run: RunFolder) -> list[str]:
    path = run.path / ".hydra" / "overrides.yaml"
    try:
        return list(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []


def _choices(
    varied: Mapping[int, Mapping[str, str]],
) -> dict[str, CategoricalDistribution]:
    """Return the values that each key has in the jobs, in the order of the jobs."""
    values: dict[str, dict[Value, None]] = {}
    for number in sorted(varied):
        for key, text in varied[number].items():
            values.setdefault(key, {})[_parse(text)] = None
    return {key: CategoricalDistribution(list(found)) for key, found in values.items()}


def _parse(text: str) -> Value:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _trial(
    number: int,
    run: RunFolder,
    varied: Mapping[str, str],
    choices: Mapping[str, BaseDistribution],
    objectives: Sequence[str],
) -> FrozenTrial:
    result: dict[str, Any] = read_json(run.result) or {}
    state = _STATES.get(result.get("status", ""), TrialState.RUNNING)
    attributes = {key: result.get(key) for key in ("step", "error")}
    # As in a grid search, more trials are no question.
    attributes["role"] = GRID
    metrics = result.get("metrics", {})
    values = [metrics.get(name) for name in objectives]
    if state == TrialState.COMPLETE and None in values:
        state = TrialState.FAIL
        attributes["error"] = f"has no {objectives[values.index(None)]}"
    evaluations = []
    for line in run.metrics():
        if line.get(objectives[0]) is not None:
            evaluations.append(line[objectives[0]])
    begun = run.identity if run.identity.exists() else run.path
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=values if state == TrialState.COMPLETE else None,
        datetime_start=_changed(begun),
        datetime_complete=_changed(run.result) if state.is_finished() else None,
        params={key: _parse(text) for key, text in varied.items()},
        distributions={key: choices[key] for key in varied},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values=dict(enumerate(evaluations)),
    )


def _changed(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime)


def _refused(number: int, reason: str | None) -> FrozenTrial:
    """Return the trial of a job that has left no folder, with the reason if there is one."""
    now = datetime.fromtimestamp(0)
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.FAIL,
        value=None,
        datetime_start=now,
        datetime_complete=now,
        params={},
        distributions={},
        user_attrs={"error": f"refused: {reason}" if reason else "left no run folder"},
        system_attrs={},
        intermediate_values={},
    )
