"""Samplers, driven as a worker drives them: real studies in which nothing is trained."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from omegaconf import DictConfig
from optuna.samplers import (
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    TPESampler,
)
from support.driving import drive_study, session_of
from support.studies import settings_of

from finetune.engine.interrupt import Interrupt
from finetune.errors import ConfigError
from sweeps.space.points import grid_points, point_count
from sweeps.space.samplers import conditions_note, constraints_note
from sweeps.space.space import Point, Space
from sweeps.study.claims import claim_trial
from sweeps.study.creation import create_or_resume
from sweeps.study.study import Study
from sweeps.study.trial import TrialRunner
from sweeps.study.waiting import enqueue_trials

SAMPLERS = ["tpe", "random", "cmaes", "qmc", "gp", "nsgaii", "nsgaiii"]
PARAMS = {
    "optimizer.learning_rate": "tag(log, interval(1e-4, 1e-2))",
    "lora.dropout": "interval(0.0, 0.15)",
    "lora.r": "range(4, 65, 4)",
    "lora.alpha": "choice(8, 16, 32)",
}


def loss(point: Point) -> float:
    """Best at a rate of 1e-3, no dropout and r of 32."""
    rate = point.get("optimizer.learning_rate", 1e-3)
    return (
        (math.log10(rate) + 3) ** 2
        + point.get("lora.dropout", 0.0)
        + abs(point.get("lora.r", 32) - 32) / 64
    )


Drive = Callable[..., list[Point]]


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    """Runs a study's trials as a worker does, but for the training; returns the points of all its
    trials."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

    def run(sampler: str, trials: int, *overrides: str, **more: Any) -> list[Point]:
        defaults: dict[str, Any] = {
            "study": "a",
            "params": PARAMS,
            "values": lambda point: [loss(point)],
            "config": {"most": 0.3},
        }
        more = defaults | more
        folder = tmp_path / more.pop("study")
        return drive_study(folder, sampler, trials, *overrides, **more)

    return run


OUTSIDE: Point = {
    "optimizer.learning_rate": 1.0,
    "lora.dropout": 0.9,
    "lora.r": 1,
    "lora.alpha": 7,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("count", [1, 4], ids=["one value outside", "all"])
def test_a_baseline_outside_of_the_space_does_not_lead_the_sampler(
    sampler: str, count: int, drive: Drive
) -> None:
    inside: Point = {
        "optimizer.learning_rate": 1e-3,
        "lora.dropout": 0.1,
        "lora.r": 32,
        "lora.alpha": 16,
    }
    baseline = {**inside, **dict(list(OUTSIDE.items())[:count])}

    def study(name: str, baseline_loss: float) -> list[Point]:
        def values(point: Point) -> list[float]:
            return [loss(point) if len(point) == len(PARAMS) else baseline_loss]

        points = [("baseline", baseline)]
        return drive(sampler, 14, study=name, points=points, values=values)

    first, *others = study("best", -10.0)
    assert first == {name: inside[name] for name in list(PARAMS)[count:]}
    space = Space.parse(PARAMS, [])
    for point in others:
        assert list(point) == list(PARAMS)
        assert space.outside(point) == {}
    # They are as if the baseline was the worst: no sampler has seen it.
    assert study("worst", 10.0)[1:] == others


def test_a_baseline_outside_comes_on_top_of_a_finite_space(drive: Drive) -> None:
    params = {"lora.r": "choice(4,8)", "lora.alpha": "choice(8,16)"}
    points = [("baseline", {"lora.r": 16, "lora.alpha": 8})]
    first, *others = drive("tpe", 5, params=params, points=points)
    assert first == {"lora.alpha": 8}
    assert distinct(others) == 4


CONDITIONAL = {
    "lora.r": "choice(4, 8)",
    "lora.alpha": "tag('lora.r=8', range(8, 33, 8))",
    "optimizer.weight_decay": "interval(0.0, 0.1)",
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_parameter_with_a_condition_is_searched_only_where_it_is_met(
    sampler: str, drive: Drive
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = drive(sampler, 16, params=CONDITIONAL)
    for point in points:
        assert ("lora.alpha" in point) == (point["lora.r"] == 8)
    assert {point["lora.r"] for point in points} == {4, 8}


def test_tpe_learns_a_parameter_with_a_condition(drive: Drive) -> None:
    def values(point: Point) -> list[float]:
        return [abs(point.get("optimizer.warmup_ratio", 2) - 0.7)]

    params = {
        "lora.use_dora": "choice(true,false)",
        "optimizer.warmup_ratio": "tag('lora.use_dora=true', interval(0.0, 1.0))",
    }
    points = drive("tpe", 60, params=params, values=values)
    late = [point for point in points[30:] if "optimizer.warmup_ratio" in point]
    assert len(late) > 20
    distances = [abs(point["optimizer.warmup_ratio"] - 0.7) for point in late]
    assert sum(distance < 0.15 for distance in distances) > len(late) / 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_with_a_condition_is_repeated(sampler: str, drive: Drive) -> None:
    params = dict(list(CONDITIONAL.items())[:2])
    points = drive(sampler, 5, params=params)
    # r of 4, and r of 8 with four values of alpha.
    assert distinct(points) == 5


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
def test_a_point_is_not_repeated_where_no_continuous_parameter_is_searched(
    sampler: str, drive: Drive
) -> None:
    params = {
        "lora.r": "choice(4, 8)",
        "optimizer.lr_scheduler_type": "choice(linear, constant)",
        "optimizer.warmup_ratio": (
            "tag('optimizer.lr_scheduler_type=linear', interval(0.0, 1.0))"
        ),
    }
    # Best without the continuous parameter, where only two points are.
    points = drive(
        sampler, 14, params=params, values=lambda point: [len(point) + point["lora.r"]]
    )
    assert distinct(points) == 14
    assert sum("optimizer.warmup_ratio" not in point for point in points) <= 2


def test_samplers_that_ignore_constraints_say_so_where_there_are_any() -> None:
    bound = "hydra.sweeper.constraints=['adapter/parameters <= 2e6']"
    for sampler in [*SAMPLERS, "grid"]:
        chosen = f"hydra/sweeper/sampler={sampler}"
        assert constraints_note(settings_of(chosen)) is None
        note = constraints_note(settings_of(chosen, bound))
        assert (note is not None) == (sampler in ("cmaes", "qmc", "random"))
        assert note is None or note.startswith(f"constraints: {sampler} does not learn")


def test_a_sampler_that_ignores_constraints_says_so_once(tmp_path: Path) -> None:
    """Optuna's CMA-ES would warn at the end of each trial; warnings are errors here."""
    bound = "hydra.sweeper.constraints=['adapter/parameters <= 2e6']"
    session = session_of(
        "hydra/sweeper/sampler=cmaes",
        bound,
        space=Space.parse(PARAMS, []),
        folder=tmp_path,
    )
    opened = create_or_resume(
        tmp_path / "a",
        session.settings,
        None,
        {"objective": "eval/loss"},
        session.space.distributions,
    )
    enqueue_trials(opened, 1, [])
    with claim_trial(opened) as claim:
        assert claim is not None
        runner = TrialRunner(session, opened, claim, Interrupt())
        runner.suggest_overrides()
        runner.trial.set_constraint("adapter/parameters <= 2e6", 1.0)
        runner.trial.study.tell(runner.trial, 1.0)


def test_samplers_that_draw_conditional_parameters_at_random_say_so() -> None:
    for sampler in SAMPLERS:
        settings = settings_of(f"hydra/sweeper/sampler={sampler}")
        note = conditions_note(settings, ["lora.alpha"])
        is_silent = sampler in ("tpe", "random")
        assert (note is None) == is_silent
        assert note is None or note.startswith("lora.alpha: drawn at random, because ")
        assert conditions_note(settings, []) is None


def distinct(points: list[Point]) -> int:
    return len({tuple(sorted(point.items())) for point in points})


def further(config: DictConfig, trial: optuna.Trial) -> None:
    """A custom search space, as users write them."""
    rate = trial.params["optimizer.learning_rate"]
    trial.suggest_float("optimizer.weight_decay", rate, rate + config.most)
    trial.suggest_int("+w", 0, 1)


def test_a_custom_search_space_suggests_further_parameters(drive: Drive) -> None:
    points = drive("random", 8, f"hydra.sweeper.custom_search_space={__name__}.further")
    assert len(points) == 8
    for point in points:
        assert (
            0
            <= point["optimizer.weight_decay"] - point["optimizer.learning_rate"]
            <= 0.3
        )
        assert point["+w"] in (0, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_gives_valid_points_the_same_with_the_same_seed(
    sampler: str, drive: Drive
) -> None:
    trials = 6 if sampler == "gp" else 9
    few = (
        ["hydra.sweeper.sampler.n_startup_trials=4"]
        if sampler in ("tpe", "gp", "cmaes")
        else []
    )
    few += (
        ["hydra.sweeper.sampler.population_size=4"]
        if sampler.startswith("nsga")
        else []
    )
    space = Space.parse(PARAMS, [])

    points = drive(sampler, trials, *few)

    assert distinct(points) == trials
    for point in points:
        space.require("point", point)
    assert drive(sampler, trials, *few, study="again") == points
    assert (
        distinct([*points, *drive(sampler, trials, *few, seed=1, study="other")])
        > trials
    )
    own = drive(
        sampler, trials, *few, "hydra.sweeper.sampler.seed=0", seed=5, study="own-seed"
    )
    assert own == points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_study_that_goes_on_is_not_given_its_first_points_again(
    sampler: str, drive: Drive
) -> None:
    first = drive(sampler, 4)
    both = drive(sampler, 8)
    assert both[:4] == first
    assert distinct(both) == 8
    assert both == drive(sampler, 8, study="in-one-go")


def test_qmc_gives_one_low_discrepancy_sequence(drive: Drive) -> None:
    params = {
        "lora.dropout": "interval(0.0, 1.0)",
        "optimizer.weight_decay": "interval(0.0, 1.0)",
    }
    points = drive("qmc", 17, params=params)

    one = optuna.create_study(
        sampler=QMCSampler(
            seed=0, warn_asynchronous_seeding=False, warn_independent_sampling=False
        )
    )
    one.optimize(
        lambda trial: sum(trial.suggest_float(name, 0.0, 1.0) for name in params),
        n_trials=17,
    )
    assert points == [trial.params for trial in one.trials]
    quarters = {
        (int(point["lora.dropout"] * 4), int(point["optimizer.weight_decay"] * 4))
        for point in points[1:]
    }
    assert len(quarters) == 16


@pytest.mark.parametrize("sampler", ["cmaes", "gp", "tpe"])
def test_a_sampler_learns_although_each_trial_has_a_fresh_one(
    sampler: str, drive: Drive
) -> None:
    params = {
        "optimizer.learning_rate": "tag(log, interval(1e-6, 1))",
        "lora.dropout": "interval(0.0, 1.0)",
    }
    trials = (
        12 if sampler == "gp" else 36
    )  # it learns the fastest, and thinks the longest
    few = [f"hydra.sweeper.sampler.n_startup_trials={trials // 3}"]
    losses = [loss(point) for point in drive(sampler, trials, *few, params=params)]
    assert sum(losses[-trials // 3 :]) < sum(losses[: trials // 3]) / 1.5


@pytest.mark.parametrize("sampler", ["nsgaii", "nsgaiii"])
def test_generations_go_on_although_each_trial_has_a_fresh_sampler(
    sampler: str, drive: Drive, tmp_path: Path
) -> None:
    drive(sampler, 12, "hydra.sweeper.sampler.population_size=4")
    trials = Study(tmp_path / "a", "s", None).trials()
    generations = [
        next(
            value
            for key, value in trial.system_attrs.items()
            if key.endswith("generation")
        )
        for trial in trials
    ]
    assert generations == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "nsgaii", "nsgaiii"])
def test_several_objectives_have_a_front_of_which_none_beats_another(
    sampler: str, drive: Drive, tmp_path: Path
) -> None:
    drive(
        sampler,
        16,
        "hydra.sweeper.direction=[minimize,minimize]",
        values=lambda point: [loss(point), float(point["lora.r"])],
    )
    study = Study(tmp_path / "a", "s", None)
    front = study.optuna.best_trials
    assert front
    assert [trial.number for trial in study.ranked()[: len(front)]] == sorted(
        trial.number for trial in front
    )
    for one in front:
        for other in front:
            pairs = list(zip(one.values, other.values, strict=True))
            assert not (all(a <= b for a, b in pairs) and any(a < b for a, b in pairs))


def test_a_grid_is_every_point_once(drive: Drive) -> None:
    params = {
        "lora.r": "choice(4,8,16)",
        "optimizer.warmup_ratio": "range(0,0.3,0.1)",
        "lora.use_dora": "true,false",
    }
    grid = grid_points(Space.parse(params, []), 0)
    assert distinct(grid) == len(grid) == 18

    points = drive(
        "grid", 18, params=params, points=[("grid", point) for point in grid]
    )
    assert points == grid
    assert grid_points(Space.parse(params, []), 0) == grid
    assert grid_points(Space.parse(params, []), 1) != grid


def small_rank(trial: optuna.trial.FrozenTrial) -> list[float]:
    """A constraint: r is at most 16."""
    return [trial.params["lora.r"] - 16]


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "nsgaiii", "gp"])
def test_a_constraint_is_given_by_its_path_without_a_plus(
    sampler: str, drive: Drive
) -> None:
    path = f"{__name__}.small_rank"
    given = f"hydra.sweeper.sampler.constraints_func={path}"
    session = session_of(
        f"hydra/sweeper/sampler={sampler}", given, space=Space.parse(PARAMS, [])
    )
    study = optuna.create_study(sampler=session.sampler(0))
    study.optimize(lambda trial: trial.suggest_int("lora.r", 1, 64), n_trials=1)
    (trial,) = study.trials
    assert list(trial.constraints.values()) == [trial.params["lora.r"] - 16]
    with pytest.raises(
        ConfigError, match=r"constraints_func=none\.such: no such function"
    ):
        drive(sampler, 2, "hydra.sweeper.sampler.constraints_func=none.such", study="b")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_point_of_a_finite_space_is_tried_twice(sampler: str, drive: Drive) -> None:
    """All six points in six trials, also where the study goes on and the user gives half a point."""
    params = {
        "lora.r": "choice(4,8)",
        "optimizer.warmup_ratio": "range(0.1,0.4,0.1)",
    }
    assert point_count(Space.parse(params, [])) == 6
    half: list[tuple[str, Point]] = [("start", {"lora.r": 8})]
    drive(sampler, 3, params=params)
    points = drive(sampler, 6, params=params, points=half)
    steps = {
        (point["lora.r"], round(point["optimizer.warmup_ratio"], 9)) for point in points
    }
    assert len(steps) == 6
    # Its user's half holds, though the sampler chose the rest.
    assert points[3]["lora.r"] == 8


@pytest.mark.parametrize(
    ("sweep", "size"),
    [
        ("choice(4,8)", 2),
        ("range(1,4)", 3),
        ("range(0,0.3,0.1)", 3),
        ("int(interval(1,8))", 8),
        ("tag(log,int(interval(1,8)))", 8),
        ("interval(0.0,1.0)", None),
        ("tag(log,interval(1e-3,1e-2))", None),
        ("interval(0.5,0.5)", 1),
    ],
)
def test_a_space_knows_the_number_of_its_points(sweep: str, size: int | None) -> None:
    assert point_count(Space.parse({"lora.r": sweep}, [])) == size
    whole = Space.parse({"lora.r": sweep, "lora.alpha": "choice(1,2,3)"}, [])
    assert point_count(whole) == (None if size is None else 3 * size)


def test_a_grid_of_a_smooth_parameter_is_refused() -> None:
    params = {"lora.dropout": "interval(0,1)", "lora.r": "choice(1,2)"}
    space = Space.parse(params, [])
    message = r"^lora\.dropout: a grid needs a choice or a range with a step"
    with pytest.raises(ConfigError, match=message):
        grid_points(space, 0)


def test_known_points_are_the_first_trials(drive: Drive) -> None:
    point = {
        "lora.r": 8,
        "lora.alpha": 16,
        "lora.dropout": 0.05,
        "optimizer.learning_rate": 1e-3,
    }
    points = drive("tpe", 3, points=[("baseline", point), ("start", {"lora.r": 64})])
    assert points[0] == point
    assert points[1]["lora.r"] == 64
    assert set(points[1]) == set(PARAMS)


@pytest.fixture(autouse=True)
def _without_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("tpe", TPESampler),
        ("cmaes", CmaEsSampler),
        ("gp", GPSampler),
        ("qmc", QMCSampler),
        ("nsgaii", NSGAIISampler),
        ("nsgaiii", NSGAIIISampler),
    ],
)
def test_a_sampler_is_chosen_by_its_name(sampler: str, kind: type) -> None:
    assert (
        type(
            session_of(
                f"hydra/sweeper/sampler={sampler}", space=Space({}, {}, [])
            ).sampler(0)
        )
        is kind
    )


def test_tpe_draws_parameters_together_and_counts_running_trials() -> None:
    sampler = session_of(space=Space({}, {}, [])).sampler(0)
    assert isinstance(sampler, TPESampler)
    inner = cast(Any, sampler)
    assert (inner._multivariate, inner._constant_liar, inner._group) == (
        True,
        True,
        False,
    )
    assert (inner._n_startup_trials, inner._n_ei_candidates) == (10, 24)


@pytest.mark.parametrize(
    ("sampler", "key", "text", "expected"),
    [
        ("grid", "seed", "123", 123),
        ("tpe", "group", "true", True),
        ("tpe", "constant_liar", "false", False),
        ("cmaes", "n_startup_trials", "7", 7),
        ("cmaes", "popsize", "12", 12),
        ("cmaes", "with_margin", "true", True),
        ("cmaes", "lr_adapt", "true", True),
        ("nsgaii", "population_size", "8", 8),
        ("qmc", "qmc_type", "halton", "halton"),
        ("gp", "deterministic_objective", "true", True),
    ],
)
def test_a_samplers_own_keys_can_be_given(
    sampler: str, key: str, text: str, expected: object
) -> None:
    settings = settings_of(
        f"hydra/sweeper/sampler={sampler}", f"hydra.sweeper.sampler.{key}={text}"
    )
    assert settings.sampler[key] == expected


def test_nsgaiii_takes_reference_points() -> None:
    session = session_of(
        "hydra/sweeper/sampler=nsgaiii",
        "hydra.sweeper.sampler.reference_points=[[0.0,1.0],[1.0,0.0]]",
        space=Space({}, {}, []),
    )
    assert isinstance(session.sampler(0), NSGAIIISampler)


def test_the_sampler_that_optuna_has_removed_says_what_to_use() -> None:
    with pytest.raises(
        ConfigError,
        match="Use 'hydra/sweeper/sampler=tpe' instead",
    ):
        session_of("hydra/sweeper/sampler=motpe", space=Space({}, {}, [])).sampler(0)


def test_a_target_that_is_no_sampler_is_refused() -> None:
    target = "hydra.sweeper.sampler._target_=builtins"
    with pytest.raises(
        ConfigError, match=f"^{target}.dict: must be a BaseSampler of Optuna"
    ):
        session_of(f"++{target}.dict", space=Space({}, {}, [])).sampler(0)
