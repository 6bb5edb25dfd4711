"""The importance of parameters, and tables of text."""

import optuna
import pytest
from optuna.trial import TrialState

from sweeps.answer.importance import comparable_trials, importances
from sweeps.study.formatting import format_table


def test_the_parameter_that_matters_is_said_to_matter() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(30):
        trial = study.ask()
        rate, dropout = (
            trial.suggest_float("rate", 0, 1),
            trial.suggest_float("dropout", 0, 1),
        )
        trial.suggest_categorical("fixed", [1])
        trial.report((rate - 0.5) ** 2 + dropout / 100, 1)
        study.tell(trial, state=TrialState.PRUNED) if rate > 0.9 else study.tell(
            trial, (rate - 0.5) ** 2
        )
    shares = importances(study)
    assert list(shares) == ["rate", "dropout"]
    assert shares["rate"].share > 0.8
    assert sum(share.share for share in shares.values()) == pytest.approx(1)


def test_few_trials_say_nothing_of_what_mattered() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(7):
        trial = study.ask()
        trial.report(trial.suggest_float("rate", 0, 1), 1)
        study.tell(trial, 1.0)
    assert importances(study) == {}


def test_a_table_has_columns_as_wide_as_their_widest_cell() -> None:
    assert (
        format_table(["a", "long"], [["wide", "x"], ["", ""]])
        == "a     long\nwide  x\n"
    )


def test_trials_are_compared_at_the_last_rung_that_all_have_reported() -> None:
    """Those of a list need not follow each other."""
    study = optuna.create_study()
    for last, state in (
        (4, TrialState.COMPLETE),
        (8, TrialState.COMPLETE),
        (3, TrialState.PRUNED),
    ):
        trial = study.ask()
        for rung in {1, 3, last}:
            trial.report(last + rung / 10, rung)
        study.tell(trial, last if state == TrialState.COMPLETE else None, state)
    assert [value for _, value in comparable_trials(study)] == [4.3, 8.3, 3.3]
