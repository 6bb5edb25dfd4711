"""What the test rows say of a study's winner: of its adapter, and of its config.

No choice of the study has seen these rows. The entries are those of `test` in `answer.json`.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.engine.evaluation import Evaluation
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.metric import Score
from finetune.run.final_evaluation import evaluate_finished_run
from finetune.run.recorded_evaluation import read_test_evaluation
from finetune.run.resources import SharedResources
from sweeps.answer.compare import (
    compare_adapters,
    compare_configs,
    metric_of,
)
from sweeps.answer.confirmation import read_confirmation
from sweeps.study.study import ANSWER, Study

log = logging.getLogger(__name__)


def compare_on_test_rows(
    study: Study,
    winner: FrozenTrial,
    run: RunFolder,
    baseline: FrozenTrial | None,
    resources: SharedResources,
) -> dict[str, Any] | None:
    """Evaluate the winner and the baseline on the test rows, unless they were before.

    Args:
        study: the study.
        winner: the winner.
        run: the winner's run.
        baseline: the trial to compare with; None if the winner is the baseline or there is none.
        resources: bases and rows that are loaded already.

    Returns:
        Losses in nats per token and the comparisons; None without test rows.
    """
    log.info("evaluating the winner and the baseline on the test rows")
    of_winner = evaluate_finished_run(run.path, resources, answer_prompts=True)
    # JSON has no NaN, and no interval could be computed from one.
    if of_winner is None or not math.isfinite(of_winner.loss):
        return None
    test: dict[str, Any] = {
        "rows": len(of_winner.row_losses),
        "looks": _count_looks(study, winner),
        "winner": of_winner.loss,
    }
    metric = metric_of(study.objectives[0])
    if of_winner.score(metric) is None:
        # A judge was out of reach, or no test row is of the objective's source.
        log.warning("test/%s has no value; the losses are compared", metric)
        metric = "loss"
    if metric != "loss":
        values = {"metric": f"test/{metric}", "winner": _score(of_winner, metric).value}
        test["objective"] = values | _rows(of_winner, metric)
    of_baseline = _evaluate_baseline(study, baseline, resources)
    if of_baseline is None or of_baseline.score(metric) is None:
        return test
    test |= _adapters(of_winner, of_baseline, "loss")
    if metric != "loss":
        entry = _adapters(of_winner, of_baseline, metric)
        test["objective"] = entry | _rows(of_winner, metric)
    test["config"] = _configs(study, of_winner, of_baseline, metric)
    return test


def _count_looks(study: Study, winner: FrozenTrial) -> int:
    """Count how many winners the study has evaluated on these rows, this one included."""
    answer = read_json(study.folder / ANSWER)
    if not answer or not answer["test"]:
        return 1
    # An answer of an earlier version does not count them.
    looks = int(answer["test"].get("looks", 1))
    return looks if answer["trial"] == winner.number else looks + 1


def _evaluate_baseline(
    study: Study, baseline: FrozenTrial | None, resources: SharedResources
) -> Evaluation | None:
    """Return the baseline's evaluation; None if it has no adapter left, or a loss is NaN."""
    if baseline is None:
        return None
    folder = study.folder_of(baseline.number)
    if not folder.adapter.is_dir() and not read_test_evaluation(folder):
        log.warning(
            "trial %d, the baseline, is not evaluated: its adapter is gone",
            baseline.number,
        )
        return None
    evaluation = evaluate_finished_run(folder.path, resources, answer_prompts=False)
    if evaluation is None or not math.isfinite(evaluation.loss):
        return None
    return evaluation


def _adapters(
    of_winner: Evaluation, of_baseline: Evaluation, metric: str
) -> dict[str, Any]:
    comparison = compare_adapters(of_winner, of_baseline, metric)
    values = {
        "metric": f"test/{metric}",
        "winner": _score(of_winner, metric).value,
        "baseline": _score(of_baseline, metric).value,
    }
    return values | _entries(asdict(comparison))


def _rows(evaluation: Evaluation, metric: str) -> dict[str, int]:
    """The entry of how many rows have a value; none where the metric is one number for all."""
    count = _score(evaluation, metric).row_count
    return {"rows": count} if count else {}


def _score(evaluation: Evaluation, metric: str) -> Score:
    score = evaluation.score(metric)
    assert score is not None, metric
    return score


def _configs(
    study: Study, of_winner: Evaluation, of_baseline: Evaluation, metric: str
) -> dict[str, Any] | None:
    """Compare the configs by a confirmation, or by further seeds of the baseline.

    None if neither has been trained.
    """
    confirmed = _confirmed(study)
    if confirmed is not None:
        return confirmed
    seeds = [of_baseline]
    for folder in study.baseline_seed_folders():
        evaluation = read_test_evaluation(folder)
        if evaluation is None or not math.isfinite(evaluation.loss):
            continue
        if evaluation.score(metric) is not None:
            seeds.append(evaluation)
    if len(seeds) < 2:
        return None
    # Pruned trials are among those that could have won.
    candidates = study.trials(TrialState.COMPLETE, TrialState.PRUNED)
    comparison = compare_configs(of_winner, seeds, len(candidates) - 1, metric)
    origin = {
        "metric": f"test/{metric}",
        "seeds": len(seeds),
        "seeds_of": "the baseline",
    }
    return origin | _entries(asdict(comparison))


def _confirmed(study: Study) -> dict[str, Any] | None:
    """Return what a confirmation says of the winner's and the baseline's config."""
    confirmation = read_confirmation(study)
    baseline = study.baseline()
    if confirmation is None or baseline is None:
        return None
    for entry in confirmation["comparisons"]:
        # A confirmation of an earlier version has no verdict.
        if entry["other"] == baseline.number and entry.get("seeds", 0) > 1:
            origin = {"metric": entry["metric"], "seeds": entry["seeds"]}
            return origin | {"seeds_of": "both"} | _entries(entry)
    return None


def _entries(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `answer.json` for the fields of a `Comparison`."""
    low, high = comparison["low"], comparison["high"]
    return {
        "difference": comparison["difference"],
        "interval_95": None if low is None else [low, high],
        "verdict": comparison["verdict"],
    }
