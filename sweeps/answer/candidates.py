"""Evaluate the candidates of a confirmation: their means, the winner, comparisons on test rows."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from finetune.errors import NoAnswer
from finetune.files.atomic import read_json
from finetune.run.recorded_evaluation import read_test_evaluation
from finetune.version import SCHEMA_VERSION
from sweeps.answer.compare import compare_seeds, metric_of
from sweeps.study.repeats import Repeat
from sweeps.study.roles import role
from sweeps.study.study import Study

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


@dataclass
class _Candidate:
    """A trial that was trained again, and what its runs have shown, by their seeds."""

    trial: FrozenTrial
    values: dict[int, float] = field(default_factory=dict)
    """The objective on the held-out rows."""
    test_losses: list[float] = field(default_factory=list)
    evaluations: "dict[int, Evaluation]" = field(default_factory=dict)
    """Evaluations on the test rows."""
    failures: list[str] = field(default_factory=list)


def evaluate_candidates(
    study: Study,
    trials: Sequence[FrozenTrial],
    repeats: Sequence[Repeat],
    errors: Mapping[Path, str],
) -> dict[str, Any]:
    """Build the content of `confirm.json`: each candidate's values, the winner, comparisons.

    Args:
        study: the study.
        trials: the trials that were trained again, the study's best first.
        repeats: their runs.
        errors: the error of each run that failed, by its folder.

    Raises:
        NoAnswer: if every run failed.
    """
    candidates = []
    for trial in trials:
        of_trial = repeats_of(repeats, trial.number)
        candidates.append(_read_candidate(study, trial, of_trial, errors))
    eligible = _eligible(candidates)
    if not eligible:
        error = next(iter(errors.values()))
        raise NoAnswer(
            f"study {study.name}: every run of the confirmation failed: {error}"
        )
    winner = _choose(study, eligible)
    seeds = {repeat.seed for repeat in repeats}
    return {
        "schema_version": SCHEMA_VERSION,
        "before": trials[0].number,
        "winner": winner.trial.number,
        "objective": study.objectives[0],
        "seeds": sorted(seeds),
        "candidates": [_summarize(candidate) for candidate in candidates],
        "comparisons": _compare_with_others(study, winner, eligible, candidates),
    }


def repeats_of(repeats: Sequence[Repeat], trial: int) -> list[Repeat]:
    """Select the repeats of a trial, by its number."""
    return [repeat for repeat in repeats if repeat.trial == trial]


def _read_candidate(
    study: Study,
    trial: FrozenTrial,
    repeats: Sequence[Repeat],
    errors: Mapping[Path, str],
) -> _Candidate:
    """Read what a candidate's runs have shown from their folders."""
    candidate = _Candidate(trial)
    for repeat in repeats:
        error = errors.get(repeat.folder.path)
        if error is not None:
            candidate.failures.append(error)
            continue
        metrics = read_json(repeat.folder.result)["metrics"]
        candidate.values[repeat.seed] = metrics[study.objectives[0]]
        # JSON has null for a NaN.
        if metrics.get("test/loss") is not None:
            candidate.test_losses.append(metrics["test/loss"])
        evaluation = read_test_evaluation(repeat.folder)
        metric = metric_of(study.objectives[0])
        if evaluation is not None and evaluation.score(metric) is not None:
            candidate.evaluations[repeat.seed] = evaluation
    return candidate


def _summarize(candidate: _Candidate) -> dict[str, Any]:
    """Summarize a candidate's runs: mean and standard deviation over the seeds."""
    values = list(candidate.values.values())
    test_losses = candidate.test_losses
    return {
        "trial": candidate.trial.number,
        "role": role(candidate.trial),
        "study": candidate.trial.value,
        "values": values,
        "mean": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "test": statistics.fmean(test_losses) if test_losses else None,
        "failed": candidate.failures,
    }


def _eligible(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Select those without failed runs, or all with a value if every one has failed runs."""
    # A mean over fewer seeds than the others' is compared only if there is nothing else.
    without_failures = [one for one in candidates if not one.failures]
    return without_failures or [one for one in candidates if one.values]


def _choose(
    study: Study, candidates: Sequence[_Candidate], without_seed: int | None = None
) -> _Candidate:
    """Choose the candidate with the best mean over the seeds, perhaps without one of them.

    Where no other seed is left, the study's own values choose.
    """

    def mean_cost(candidate: _Candidate) -> float:
        values = [
            value for seed, value in candidate.values.items() if seed != without_seed
        ]
        # The study's own value is one of a further seed.
        mean = statistics.fmean(values) if values else candidate.trial.value
        assert mean is not None
        return study.to_cost(mean)

    return min(candidates, key=mean_cost)


def _compare_with_others(
    study: Study,
    winner: _Candidate,
    eligible: Sequence[_Candidate],
    candidates: Iterable[_Candidate],
) -> list[dict[str, Any]]:
    """Compare the winner with each other candidate on the test rows, by the seeds of both.

    The winner was chosen by these seeds, which would flatter it. So on each seed stands the
    candidate that the other seeds alone choose (cross-fitting): the winner, where it is clear.
    """
    metric = metric_of(study.objectives[0])
    comparisons = []
    for other in candidates:
        if other is winner:
            continue
        chosen_evaluations = []
        other_evaluations = []
        for seed in sorted(other.evaluations):
            evaluated = [one for one in eligible if seed in one.evaluations]
            if not evaluated:
                continue
            chosen = _choose(study, evaluated, without_seed=seed)
            chosen_evaluations.append(chosen.evaluations[seed])
            other_evaluations.append(other.evaluations[seed])
        if not chosen_evaluations:
            continue
        comparison = compare_seeds(chosen_evaluations, other_evaluations, metric)
        entry = {
            "trial": winner.trial.number,
            "other": other.trial.number,
            "metric": f"test/{metric}",
            "rows": len(other_evaluations[0].row_losses),
            "seeds": len(other_evaluations),
            **dataclasses.asdict(comparison),
        }
        comparisons.append(entry)
    return comparisons
