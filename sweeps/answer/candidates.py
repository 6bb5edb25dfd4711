"""Evaluate the candidates of a confirmation: their means, the winner, comparisons on test rows."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.run.final_evaluation import read_test_evaluation
from sweeps.answer.compare import compare
from sweeps.answer.retrain import Repeat
from sweeps.study.study import Study, role

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


def evaluate_candidates(
    study: Study,
    candidates: Sequence[FrozenTrial],
    repeats: Sequence[Repeat],
    errors: Mapping[Path, str],
) -> dict[str, Any]:
    """Build the content of `confirm.json`: each candidate's values, the winner, comparisons."""
    summaries = []
    for trial in candidates:
        of_trial = repeats_of(repeats, trial.number)
        summaries.append(_summarize(study, trial, of_trial, errors))
    winner = _choose_winner(study, summaries, errors)
    seeds = {repeat.seed for repeat in repeats}
    return {
        "before": candidates[0].number,
        "winner": winner,
        "objective": study.objectives[0],
        "seeds": sorted(seeds),
        "candidates": summaries,
        "comparisons": _compare_with_winner(repeats, winner, candidates),
    }


def repeats_of(repeats: Sequence[Repeat], trial: int) -> list[Repeat]:
    """Select the repeats of a trial, by its number."""
    return [repeat for repeat in repeats if repeat.trial == trial]


def _summarize(
    study: Study,
    trial: FrozenTrial,
    repeats: Sequence[Repeat],
    errors: Mapping[Path, str],
) -> dict[str, Any]:
    """Summarize a candidate's runs: mean and standard deviation over the seeds."""
    objective = study.objectives[0]
    values = []
    test_losses = []
    failures = []
    for repeat in repeats:
        error = errors.get(repeat.folder.path)
        if error is not None:
            failures.append(error)
            continue
        metrics = read_json(repeat.folder.result)["metrics"]
        values.append(metrics[objective])
        # JSON has null for a NaN.
        if metrics.get("test/loss") is not None:
            test_losses.append(metrics["test/loss"])
    return {
        "trial": trial.number,
        "role": role(trial),
        "study": trial.value,
        "values": values,
        "mean": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "test": statistics.fmean(test_losses) if test_losses else None,
        "failed": failures,
    }


def _choose_winner(
    study: Study, summaries: Sequence[Mapping[str, Any]], errors: Mapping[Path, str]
) -> int:
    """Choose the candidate with the best mean, among those without failed runs if there are any."""
    # A mean over fewer seeds than the others' is compared only if there is nothing else.
    without_failures = [summary for summary in summaries if not summary["failed"]]
    with_values = [summary for summary in summaries if summary["values"]]
    eligible = without_failures or with_values
    if not eligible:
        error = next(iter(errors.values()))
        raise ConfigError(
            f"study {study.name}: every run of the confirmation failed: {error}"
        )

    def mean_cost(summary: Mapping[str, Any]) -> float:
        return study.to_cost(summary["mean"])

    best = min(eligible, key=mean_cost)
    return int(best["trial"])


def _compare_with_winner(
    repeats: Sequence[Repeat], winner: int, candidates: Sequence[FrozenTrial]
) -> list[dict[str, Any]]:
    """Compare the winner with each other candidate on the test rows, by the seeds both have."""
    evaluations = _test_evaluations(repeats)
    of_winner = evaluations[winner]
    comparisons = []
    for candidate in candidates:
        of_candidate = evaluations[candidate.number]
        # The comparison is paired: both sides need the same seeds in the same order.
        seeds = sorted(of_winner.keys() & of_candidate.keys())
        if candidate.number == winner or not seeds:
            continue
        winner_evaluations = [of_winner[seed] for seed in seeds]
        candidate_evaluations = [of_candidate[seed] for seed in seeds]
        comparison = compare(winner_evaluations, candidate_evaluations)
        entry = {
            "trial": winner,
            "other": candidate.number,
            "rows": len(winner_evaluations[0].row_losses),
            **dataclasses.asdict(comparison),
        }
        comparisons.append(entry)
    return comparisons


def _test_evaluations(repeats: Sequence[Repeat]) -> "dict[int, dict[int, Evaluation]]":
    """Read the evaluations on the test rows: by trial, then by seed."""
    evaluations: dict[int, dict[int, Evaluation]] = defaultdict(dict)
    for repeat in repeats:
        evaluation = read_test_evaluation(repeat.folder)
        if evaluation is not None:
            evaluations[repeat.trial][repeat.seed] = evaluation
    return evaluations
