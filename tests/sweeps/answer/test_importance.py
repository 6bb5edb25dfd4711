"""The importance of parameters, and tables of text."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from support.studies import made_unchecked, trial

from sweeps.answer.importance import (
    comparable_trials,
    describe_importance,
    importances,
)
from sweeps.study.formatting import format_table


def random_study(trials: int, objective: Callable[[float], float]) -> optuna.Study:
    """A study of a rate that the objective is of, and of parameters without influence."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(trials):
        asked = study.ask()
        rate = asked.suggest_float("rate", 0, 1)
        asked.suggest_float("dropout", 0, 1)
        asked.suggest_categorical("targets", ["all", "some", None])
        asked.suggest_categorical("fixed", [1])
        asked.report(objective(rate), 1)
        if rate > 0.9:
            study.tell(asked, state=TrialState.PRUNED)
        else:
            asked.report(objective(rate), 2)
            study.tell(asked, objective(rate))
    return study


def test_the_parameter_that_matters_is_said_to_matter() -> None:
    importance = importances(random_study(30, lambda rate: (rate - 0.5) ** 2))

    assert importance.trials == 30
    assert list(importance.influences) == ["rate"]
    assert 0.6 < importance.influences["rate"] <= 1
    assert sorted(importance.unresolved) == ["dropout", "targets"]
    assert importance.rung == "rung 1 of 2"


def test_a_few_diverged_trials_do_not_decide_what_mattered() -> None:
    def objective(rate: float) -> float:
        return 1000.0 if rate > 0.97 else (rate - 0.5) ** 2

    importance = importances(random_study(40, objective))

    assert importance.influences["rate"] > 0.7


@pytest.mark.parametrize(
    ("trials", "objective", "line"),
    [
        (19, lambda rate: rate, "not known from 19 trials (needs 20)"),
        (20, lambda rate: 1.0, "not known from 20 trials (at rung 1 of 2)"),
        (
            40,
            lambda rate: rate,
            r"rate \d\d%; not known from 40 trials: \w+, \w+ (at rung 1 of 2)",
        ),
        (
            40,
            # Without relation to the rate: digits of it.
            lambda rate: rate * 1e6 % 1,
            "not known from 40 trials (at rung 1 of 2)",
        ),
    ],
)
def test_influence_is_said_only_where_trials_show_one(
    trials: int, objective: Callable[[float], float], line: str
) -> None:
    description = describe_importance(importances(random_study(trials, objective)))

    pattern = line.replace("(", r"\(").replace(")", r"\)")
    assert re.fullmatch(pattern, description)


@pytest.mark.parametrize(
    "newest",
    [
        CategoricalDistribution(["low", "high"]),
        CategoricalDistribution([1, 2, 3]),
        FloatDistribution(0, 1),
        IntDistribution(1, 100, log=True),
    ],
)
def test_parameters_whose_range_changed_meanwhile_are_explained_too(
    newest: BaseDistribution, tmp_path: Path
) -> None:
    draw = random.Random(0)
    trials = [trial(draw) for _ in range(40)]
    text_choices = CategoricalDistribution(["a", "b"])
    for number, each in enumerate(trials[:20]):
        each.params["x"] = "ab"[number % 2]
        each._distributions["x"] = text_choices
    for number, each in enumerate(trials[20:]):
        choices = getattr(newest, "choices", (0.5, 0.7) if number % 2 else (1, 1))
        each.params["x"] = choices[number % 2]
        each._distributions["x"] = newest

    study = made_unchecked(tmp_path / "s", trials)

    assert set(importances(study.optuna).shares or {}) == {*trials[0].params}


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
        asked = study.ask()
        for rung in {1, 3, last}:
            asked.report(last + rung / 10, rung)
        study.tell(asked, last if state == TrialState.COMPLETE else None, state)
    assert [value for _, value in comparable_trials(study)] == [4.3, 8.3, 3.3]
