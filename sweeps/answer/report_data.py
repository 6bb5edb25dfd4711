"""The data of a report, read once from a study and its folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from sweeps.answer.advice import Analysis, analyze
from sweeps.answer.confirmation import read_confirmation
from sweeps.study.study import ANSWER, Study


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows."""

    study: Study
    """A snapshot, so that all sections agree while workers go on."""
    analysis: Analysis
    trials: Mapping[int, FrozenTrial]
    """All started trials by number."""
    results: Mapping[int, Mapping[str, Any]]
    """Content of each trial's `result.json`; empty if it has none."""
    metrics: Mapping[int, Sequence[Mapping[str, Any]]]
    """Lines of each trial's `metrics.jsonl`."""
    confirmation: Mapping[str, Any] | None
    """Content of `confirm.json`, if it still holds."""
    winner: FrozenTrial | None
    """The confirmed winner, or the best trial so far."""
    answer: Mapping[str, Any] | None
    """Content of `answer.json`, if it is about the winner."""

    @classmethod
    def read(cls, study: Study, analysis: Analysis | None) -> "ReportData":
        """Read the data of a study.

        Args:
            study: a snapshot of the study.
            analysis: the analysis of its trials; None: it is computed.

        Returns:
            The data.
        """
        trials: dict[int, FrozenTrial] = {}
        results: dict[int, Mapping[str, Any]] = {}
        metrics: dict[int, Sequence[Mapping[str, Any]]] = {}
        for trial in study.trials():
            # It has no folder and no values yet.
            if trial.state == TrialState.WAITING:
                continue
            folder = study.folder_of(trial.number)
            trials[trial.number] = trial
            results[trial.number] = read_json(folder.result) or {}
            metrics[trial.number] = folder.metrics()
        confirmation = read_confirmation(study)
        winner = _winner(study, confirmation)
        return cls(
            study=study,
            analysis=analysis or analyze(study),
            trials=trials,
            results=results,
            metrics=metrics,
            confirmation=confirmation,
            winner=winner,
            answer=_answer(study, winner),
        )

    @property
    def test(self) -> Mapping[str, Any] | None:
        """The winner's and the baseline's losses on the test rows, if they were measured."""
        return self.answer["test"] if self.answer else None

    @property
    def has_several_objectives(self) -> bool:
        """Whether trials are ranked by a Pareto front instead of one number."""
        return len(self.study.objectives) > 1

    def pareto_front(self) -> set[int]:
        """Return the numbers of the trials on the Pareto front; empty with one objective."""
        if not self.has_several_objectives:
            return set()
        return {trial.number for trial in self.study.optuna.best_trials}


def _winner(study: Study, confirmation: Mapping[str, Any] | None) -> FrozenTrial | None:
    ranked = study.ranked()
    if confirmation is not None:
        number = confirmation["winner"]
        return next(trial for trial in study.trials() if trial.number == number)
    return ranked[0] if ranked else None


def _answer(study: Study, winner: FrozenTrial | None) -> Mapping[str, Any] | None:
    """Read the answer; None if there is none yet, or it is about another trial."""
    if winner is None:
        return None
    answer: Mapping[str, Any] | None = read_json(study.folder / ANSWER)
    if answer is None or answer["trial"] != winner.number:
        return None
    return answer
