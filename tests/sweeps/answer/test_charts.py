"""The report's charts mark the winner where it is, and show pruned trials with their last values."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, create_trial
from support.studies import COMPLETE, PRUNED, SPACE, made_study, trial

from sweeps.answer import charts
from sweeps.answer.parallel_coordinates import parallel_coordinates
from sweeps.study.study import Study

CHOICES = CategoricalDistribution(["cosine", "linear", "constant"])


def with_schedule(draw: random.Random, state: Any = COMPLETE) -> FrozenTrial:
    """A trial with a parameter of each kind; many trials share their values."""
    space: dict[str, BaseDistribution] = SPACE | {"optimizer.schedule": CHOICES}
    params = {
        "lora.r": draw.choice([4, 8, 16, 32, 64]),
        "lora.dropout": draw.choice([0.0, 0.15]),
        "optimizer.learning_rate": 10 ** draw.uniform(-4, -2),
        "optimizer.schedule": draw.choice(CHOICES.choices),
    }
    # Ties, as an accuracy has them.
    value = draw.choice([0.25, 0.5])
    return create_trial(
        state=state,
        params=params,
        distributions=space,
        value=value,
        intermediate_values={1: value},
    )


def studies(tmp_path: Path) -> list[Study]:
    draw = random.Random(0)
    plain = [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(12)]
    return [
        made_study(tmp_path / "plain", plain),
        made_study(tmp_path / "tied", [with_schedule(draw) for _ in range(12)]),
    ]


@pytest.mark.parametrize("winner", [0, 4, 11])
def test_parallel_coordinates_mark_the_winners_line(
    winner: int, tmp_path: Path
) -> None:
    for study in studies(tmp_path):
        figure = parallel_coordinates(study, winner)
        assert figure is not None
        lines = [line for line in figure.data if line.mode == "lines"]
        assert len(lines) == 12
        (marked,) = [line for line in lines if line.showlegend]
        assert marked.name == f"winner (trial {winner})"
        assert marked.line.width > max(
            line.line.width for line in lines if line != marked
        )
        assert lines[-1] == marked
        # Each line is the one of the trial that it names.
        for line in lines:
            number = int(line.hovertemplate.split()[1].rstrip(":"))
            params = study.trials()[number].params
            shown = dict(text.split(" ", 1) for text in line.text)
            assert float(shown["r"]) == params["lora.r"]
            rate = params["optimizer.learning_rate"]
            assert float(shown["learning_rate"]) == pytest.approx(rate, rel=5e-3)
            axis = list(shown).index("learning_rate")
            assert line.y[axis] == pytest.approx((math.log10(rate) + 4) / 2)
            if "schedule" in shown:
                choice_index = CHOICES.choices.index(params["optimizer.schedule"])
                assert line.y[list(shown).index("schedule")] == choice_index / 2


@pytest.mark.parametrize("winner", [0, 4, 11])
def test_each_slice_has_a_star_at_the_winner(winner: int, tmp_path: Path) -> None:
    for study in studies(tmp_path):
        figure = charts.slices(study, winner)
        assert figure is not None
        best = study.trials()[winner]
        stars = [points for points in figure.data if points.marker.symbol == "star"]
        assert len(stars) == len(best.params)
        assert [star.showlegend for star in stars].count(True) == 1
        for star in stars:
            axis = figure.layout[star.xaxis.replace("x", "xaxis")]
            value = best.params[axis.title.text]
            (shown,) = star.x
            assert shown in (value, repr(value))
            assert star.y == (best.intermediate_values[1],)
            assert star.text == (f"trial {winner}",)


def test_without_a_winner_nothing_is_marked(tmp_path: Path) -> None:
    for study in studies(tmp_path):
        for figure in (charts.slices(study, None), parallel_coordinates(study, None)):
            assert figure is not None
            assert not any("winner" in (trace.name or "") for trace in figure.data)


def test_the_history_shows_pruned_trials_with_their_last_values(tmp_path: Path) -> None:
    draw = random.Random(0)
    diverged = trial(draw, PRUNED, intermediate_values={1: math.nan})
    trials = [
        trial(draw),
        trial(draw, PRUNED, intermediate_values={1: 2.5, 2: 2.25}),
        diverged,
        trial(draw, PRUNED, intermediate_values={}),
        trial(draw),
    ]
    figure = charts.history(made_study(tmp_path / "s", trials))

    assert figure is not None
    traces = {trace.name: trace for trace in figure.data}
    assert traces["eval/loss"].x == (0, 4)
    pruned = traces["pruned (last value)"]
    assert (pruned.x, pruned.y) == ((1,), (2.25,))
    assert pruned.marker.symbol != traces["eval/loss"].marker.symbol


def test_the_pareto_front_stands_out(tmp_path: Path) -> None:
    values = [[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]]
    trials = [create_trial(values=pair) for pair in values]
    figure = charts.pareto_front(made_study(tmp_path / "s", trials, "a/1", "a/2"))

    assert figure is not None
    points = {trace.name: trace for trace in figure.data}
    assert points["on the Pareto front"].x == (1.0, 2.0)
    assert points["dominated"].x == (3.0,)
    colours = {trace.marker.color for trace in figure.data}
    assert len(colours) == 2
