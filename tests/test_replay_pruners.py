"""The replay of pruners on curves (benchmarks/replay_pruners.py)."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from support.matrix import further

from finetune.config.paths import CONF
from sweeps.space.pruners import SuccessiveHalvingPruner

HEADER = "trial,seed,step,value"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # The scripts import their neighbours.
        patch.syspath_prepend(CONF.parent / "benchmarks")
        yield importlib.import_module("replay_pruners")


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_curves_are_read_by_config_and_seed(script: ModuleType, tmp_path: Path) -> None:
    """In any order of lines and columns; the evaluation before the first step is left out."""
    file = written(
        tmp_path / "curves.csv",
        "value,step,seed,trial,note",
        "2.5,0,1,a,x",
        "1.0,20,1,a,x",
        "2.0,10,1,a,x",
        "1.5,10,2,a,x",
        "nan,20,2,a,x",
        "3.0,30,1,b,x",
    )
    curves = script.read_curves(file)
    assert [(c.trial, c.seed, c.steps) for c in curves] == [
        ("a", "1", [10, 20]),
        ("a", "2", [10, 20]),
        ("b", "1", [30]),
    ]
    assert curves[0].values == [2.0, 1.0]
    assert [c.result for c in curves] == [1.0, math.inf, 3.0]
    assert script.read_curves(file, maximize=True)[0].values == [-2.0, -1.0]
    assert {*script.by_config(curves)} == {"a", "b"}
    assert curves[2].params == {"note": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["trial,step,value", "a,1,2.0"], "no column seed"),
        ([""], "no column seed, step, trial, value"),
        ([HEADER], "no curves"),
        ([HEADER, "a,0,1,2.0", "a,0,x,2.0"], "line 3: step=x, value=2.0: must be"),
        ([HEADER, "a,0,1,"], "line 2: step=1, value=: must be"),
        ([HEADER, "a,0,1"], "line 2: step=1, value=None: must be"),
        ([HEADER, "a,0,1,2.0", "a,0,1,2.1"], "line 3: step=1: twice in one run"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    script: ModuleType, tmp_path: Path, lines: list[str], message: str
) -> None:
    file = written(tmp_path / "curves.csv", *lines)
    with pytest.raises(SystemExit) as refused:
        script.read_curves(file)
    text = str(refused.value)
    assert text.startswith(str(file))
    assert message in text
    assert "\n" not in text


def test_written_curves_are_read_again(script: ModuleType, tmp_path: Path) -> None:
    curves = script.synthetic_curves(5, 27, 0.02, seed=0)
    script.write_curves(curves, tmp_path / "curves.csv")
    assert script.read_curves(tmp_path / "curves.csv") == curves


@pytest.mark.parametrize(
    ("steps", "rungs"),
    [
        ([15, 30, 45, 60], [1, 2, 3, 4]),
        ([2, 6, 18, 54], [1, 3, 9, 27]),
        ([9, 10], [1, 2]),
    ],
)
def test_rungs_are_numbered_as_in_a_study(
    script: ModuleType, steps: list[int], rungs: list[int]
) -> None:
    assert script.Curve("a", "0", steps, [1.0] * len(steps)).rungs == rungs


def test_runs_that_diverge_do_not_change_the_unit_of_regret(script: ModuleType) -> None:
    good = [1.0 + number / 100 for number in range(101)]
    unit = script.spread([*good, *[50.0] * 5, math.inf])
    assert unit == pytest.approx(script.spread([*good, *[2.1] * 6]))
    assert unit == pytest.approx(0.4, abs=0.05)


def flat_curves(script: ModuleType, *values: float) -> list[Any]:
    return [
        script.Curve(str(number), "0", [10, 20, 30, 40], [value] * 4)
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("slots", "steps"),
    [
        # The best third alone continues. One after the other: 0, 1 and 3 run to their end.
        (1, [40, 40, 10, 40]),
        (2, [40, 40, 10, 40]),
        # 3 takes 2's slot, and 1 is pruned at the step at which 3 reports its first rung.
        (3, [40, 20, 10, 40]),
        (4, [40, 10, 10, 40]),
    ],
)
def test_a_replay_trains_what_a_study_would(
    script: ModuleType, slots: int, steps: list[int]
) -> None:
    pruner = SuccessiveHalvingPruner(min_survivors=1, noise_margin=0)
    curves = flat_curves(script, 3.0, 2.0, 2.5, 1.0)
    outcome = script.replay_curves(curves, slots, pruner)
    assert outcome.steps == sum(steps)
    complete = {int(curve.trial) for curve in outcome.complete}
    assert complete == {number for number, step in enumerate(steps) if step == 40}


def test_without_a_pruner_a_replay_trains_all_and_loses_none(
    script: ModuleType,
) -> None:
    curves = script.synthetic_curves(30, 9, 0.02, seed=1)
    figures = script.compare_trials(curves, 8, 4, optuna.pruners.NopPruner, 5)
    assert (figures.lost, figures.given_away, figures.saved) == (0, 0, 0)
    _, complete = script.compare_budget(curves, 6, 2, optuna.pruners.NopPruner, 5)
    assert complete == [6] * 5


def test_a_replay_judges_no_trial_within_the_warmup(script: ModuleType) -> None:
    pruner = SuccessiveHalvingPruner(min_survivors=1, noise_margin=0)
    curves = flat_curves(script, 1.0, 2.0, 3.0)
    assert script.replay_curves(curves, 3, pruner).steps == 40 + 10 + 10
    pruner = SuccessiveHalvingPruner(min_survivors=1, noise_margin=0)
    assert script.replay_curves(curves, 3, pruner, warmup=0.3).steps == 40 + 30 + 30


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8, *further(1)])
def test_the_noise_and_three_trials_lose_fewer_winners_at_little_cost(
    script: ModuleType, slots: int
) -> None:
    """Synthetic curves that cross, with noise, from a ninth of the steps on."""
    curves = script.synthetic_curves(200, 27, 0.02, seed=0)

    def compare(survivors: int, margin: float) -> tuple[float, float, float]:
        figures = script.compare_trials(
            curves,
            32,
            slots,
            lambda: SuccessiveHalvingPruner(3, 3, 0, survivors, margin),
            200,
            warmup=0.05,
        )
        return figures.lost, figures.given_away, figures.saved

    plain, noise, both = compare(1, 0), compare(1, 1), compare(3, 1)
    assert noise[0] < 0.7 * plain[0]
    assert both[0] < 0.6 * plain[0]
    assert both[1] < 0.25 * plain[1]
    assert plain[2] - noise[2] < 0.13
    assert plain[2] - both[2] < 0.19
    assert both[2] > 0.5
