"""Parallel coordinates: each trial is a line through its objective and its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from plotly.colors import sample_colorscale

from sweeps.answer.chart_style import GREEN, SCALE, SLATE, set_style
from sweeps.answer.importance import (
    MeasuredTrial,
    common_parameters,
    comparable_trials,
    study_of_values,
)
from sweeps.answer.ranges import bounds, newest_distributions, position
from sweeps.study.formatting import format_value, short_name
from sweeps.study.study import Study

# Optuna's own chart can't mark a trial: its lines do not say which trials they are.

MAX_TICKS = 9
"""Of more choices only the first and the last are named."""

MAX_TICK_LENGTH = 16
"""Longer texts would reach the axis before; the line's text under the pointer is whole."""

Tick = tuple[float, str]
"""A position on an axis, 0 at its lower end and 1 at its upper one, and the text beside it."""


@dataclass(frozen=True)
class _Axis:
    """An upright axis of the chart."""

    title: str
    positions: Sequence[float]
    """Where each trial's line crosses the axis: 0 at its lower end, 1 at its upper one."""
    texts: Sequence[str]
    """The value of each trial."""
    ticks: Sequence[Tick]


def parallel_coordinates(study: Study, winner: int | None) -> go.Figure | None:
    """Draw each trial as a line through its parameters, coloured by its objective.

    Args:
        study: the study.
        winner: number of the trial to highlight.

    Returns:
        The chart; None if there is too little to draw.
    """
    measured = comparable_trials(study.optuna)
    parameters = _parameter_axes(measured)
    if len(measured) < 2 or not parameters:
        return None
    objective = _objective_axis(study.objectives[0], measured)
    axes = [objective, *parameters]
    is_minimized = study.optuna.directions[0] == StudyDirection.MINIMIZE
    figure = go.Figure()
    highlighted = []
    for index, (trial, _) in enumerate(measured):
        if trial.number == winner:
            highlighted.append(_winner_line(trial, axes, index))
            continue
        share = objective.positions[index]
        goodness = 1 - share if is_minimized else share
        figure.add_trace(_line(trial, axes, index, goodness))
    # Last, so that it lies above the other lines.
    figure.add_traces(highlighted)
    values = [value for _, value in measured]
    figure.add_trace(_colour_bar(objective.title, values, is_minimized))
    return _draw_axes(set_style(figure), axes)


def _objective_axis(name: str, measured: Sequence[MeasuredTrial]) -> _Axis:
    values = [value for _, value in measured]
    low, high = min(values), max(values)
    width = high - low
    positions = [(value - low) / width if width else 0.5 for value in values]
    texts = [f"{value:.4f}" for value in values]
    ticks = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if width else [(0.5, texts[0])]
    return _Axis(name, positions, texts, ticks)


def _parameter_axes(measured: Sequence[MeasuredTrial]) -> list[_Axis]:
    """Return an axis for each parameter that all trials have, over the whole of its range."""
    trials = [trial for trial, _ in measured]
    # A copy with one range for each parameter: the space may have changed during the study.
    copy = study_of_values(measured, common_parameters(trials))
    ranges = newest_distributions(copy.get_trials(deepcopy=False))
    axes = []
    for name in sorted(ranges):
        distribution = ranges[name]
        positions = []
        texts = []
        for trial in trials:
            value = trial.params[name]
            positions.append(_position(distribution, value))
            texts.append(format_value(value))
        ticks = _ticks(distribution)
        axes.append(_Axis(short_name(name), positions, texts, ticks))
    return axes


def _position(distribution: BaseDistribution, value: Any) -> float:
    """Return the position of a value on its axis; choices stand at equal distances."""
    if isinstance(distribution, CategoricalDistribution):
        last_index = len(distribution.choices) - 1
        index = distribution.to_internal_repr(value)
        return index / last_index if last_index else 0.5
    share = position(distribution, value)
    return 0.5 if share is None else share


def _ticks(distribution: BaseDistribution) -> list[Tick]:
    if isinstance(distribution, CategoricalDistribution):
        values = list(distribution.choices)
        if len(values) > MAX_TICKS:
            values = [values[0], values[-1]]
    else:
        # Once where both are equal.
        values = list(dict.fromkeys(bounds(distribution)))
    ticks = []
    for value in values:
        text = format_value(value)
        if len(text) > MAX_TICK_LENGTH:
            text = f"{text[: MAX_TICK_LENGTH - 1]}…"
        ticks.append((_position(distribution, value), text))
    return ticks


def _line(
    trial: FrozenTrial, axes: Sequence[_Axis], index: int, goodness: float
) -> go.Scatter:
    """Draw a trial's line.

    Args:
        trial: the trial.
        axes: the chart's axes.
        index: the trial's index in each axis.
        goodness: 0 for the worst trial, 1 for the best; the better, the bluer and more opaque.
    """
    (colour,) = sample_colorscale(SCALE, [goodness])
    return go.Scatter(
        x=list(range(len(axes))), y=[axis.positions[index] for axis in axes],
        text=[f"{axis.title} {axis.texts[index]}" for axis in axes],
        hovertemplate=f"trial {trial.number}: %{{text}}<extra></extra>",
        mode="lines", line={"color": colour, "width": 1.5}, opacity=0.3 + 0.6 * goodness,
        name=f"trial {trial.number}", showlegend=False,
    )  # fmt: skip


def _winner_line(trial: FrozenTrial, axes: Sequence[_Axis], index: int) -> go.Scatter:
    line = _line(trial, axes, index, 1.0)
    style = {"color": GREEN, "width": 3.5}
    name = f"winner (trial {trial.number})"
    return line.update(line=style, opacity=1, name=name, showlegend=True)


def _colour_bar(title: str, values: Sequence[float], is_minimized: bool) -> go.Scatter:
    """Draw nothing but the bar that explains the colours."""
    low, high = min(values), max(values)
    marker = {
        "color": [low, high], "cmin": low, "cmax": high, "colorscale": SCALE,
        "reversescale": is_minimized, "showscale": True, "colorbar": {"title": title},
    }  # fmt: skip
    return go.Scatter(
        x=[None, None], y=[None, None], mode="markers", marker=marker,
        showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _draw_axes(figure: go.Figure, axes: Sequence[_Axis]) -> go.Figure:
    shapes = []
    annotations = []
    for number, axis in enumerate(axes):
        shape = {
            "type": "line", "x0": number, "x1": number, "y0": 0, "y1": 1,
            "line": {"color": SLATE, "width": 1}, "layer": "below",
        }  # fmt: skip
        shapes.append(shape)
        for height, text in axis.ticks:
            annotation = {
                "x": number, "y": height, "text": text, "showarrow": False,
                "xanchor": "right", "xshift": -4, "font": {"size": 11},
            }  # fmt: skip
            annotations.append(annotation)
    numbers = list(range(len(axes)))
    return figure.update_layout(
        shapes=shapes, annotations=annotations, hovermode="closest",
        xaxis={
            "tickvals": numbers, "ticktext": [axis.title for axis in axes],
            "range": [-0.4, len(axes) - 0.8], "showgrid": False, "zeroline": False,
        },
        yaxis={"range": [-0.08, 1.08], "visible": False, "fixedrange": True},
    )  # fmt: skip
