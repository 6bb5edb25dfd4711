"""What a sampler reads of a study with thousands of trials."""

import random
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.studies import settings_of

from sweeps.space.samplers import reads_bounded_trials
from sweeps.study.recent_trials import BEST_TRIALS, MOST_TRIALS, RecentTrialsSampler

SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}


def study_of(trials: int, direction: str = "minimize", waiting: int = 5) -> Any:
    draw = random.Random(2)
    study = optuna.create_study(direction=direction)
    for number in range(trials):
        params = {"x": draw.random(), "y": draw.random()}
        state = TrialState.PRUNED if number % 3 == 2 else TrialState.COMPLETE
        trial = create_trial(
            state=state,
            params=params,
            distributions=dict(SPACE),
            value=draw.random() if state == TrialState.COMPLETE else None,
            intermediate_values={1: draw.random()},
        )
        study.add_trial(trial)
    study.add_trial(create_trial(state=TrialState.RUNNING))
    for _ in range(waiting):
        study.add_trial(create_trial(state=TrialState.WAITING))
    return study


def read_by(study: Any) -> list[FrozenTrial]:
    """The trials that a sampler reads, with all states."""
    read: list[list[FrozenTrial]] = []

    class Reads(TPESampler):
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            read.append(study._get_trials(deepcopy=False))
            return {}

    RecentTrialsSampler(Reads()).sample_relative(study, study.trials[-1], {})
    return read[0]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_beyond_a_thousand_a_sampler_reads_the_latest_and_the_best(
    direction: str,
) -> None:
    study = study_of(MOST_TRIALS + 300, direction)
    read = read_by(study)

    *finished, running = read
    assert running.state == TrialState.RUNNING
    old = finished[:BEST_TRIALS]
    assert [trial.number for trial in finished[BEST_TRIALS:]] == list(
        range(300, MOST_TRIALS + 300)
    )
    rivals = [trial for trial in study.trials[:300] if trial.value is not None]
    rivals.sort(key=lambda trial: trial.value, reverse=direction == "maximize")
    assert {trial.number for trial in old} == {
        trial.number for trial in rivals[:BEST_TRIALS]
    }


def test_up_to_a_thousand_it_suggests_what_it_would_alone() -> None:
    def suggest(study: Any, wrap: bool) -> Sequence[Any]:
        sampler: Any = TPESampler(seed=3)
        study.sampler = RecentTrialsSampler(sampler) if wrap else sampler
        return list(study.ask(SPACE).params.values())

    assert suggest(study_of(300, waiting=0), True) == suggest(
        study_of(300, waiting=0), False
    )


@pytest.mark.parametrize(
    ("overrides", "bounded"),
    [
        ([], True),
        (["hydra/sweeper/sampler=gp"], True),
        (["hydra/sweeper/sampler=cmaes"], False),
        (["hydra.sweeper.direction=[minimize,maximize]"], False),
    ],
)
def test_only_samplers_that_get_slower_read_fewer(
    overrides: list[str], bounded: bool
) -> None:
    assert reads_bounded_trials(settings_of(*overrides)) == bounded
