"""Charts of a study, by Optuna's plots and plotly. Each is None if there is too little to draw."""

import math
from collections.abc import Mapping
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from finetune.metrics.names import describe_metric
from sweeps.answer.chart_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SCALE,
    STATES,
    set_style,
    set_titles,
)
from sweeps.answer.importance import (
    Importance,
    common_parameters,
    comparable_trials,
    study_of_values,
)
from sweeps.study.formatting import short_name
from sweeps.study.study import Study


def history(study: Study) -> go.Figure | None:
    """Draw each trial's objective in order, pruned trials' last values, and the best so far."""
    complete = study.trials(TrialState.COMPLETE)
    if not any(math.isfinite(trial.values[0]) for trial in complete):
        return None
    # Optuna's plot of several objectives has to be told which one it draws.
    target = _first_objective if len(study.objectives) > 1 else None
    figure = visualization.plot_optimization_history(
        study.optuna, target=target, target_name=describe_metric(study.objectives[0])
    )
    _add_pruned(figure, study)
    return set_style(figure)


def _add_pruned(figure: go.Figure, study: Study) -> None:
    """Add the last value of each pruned trial; it is of an earlier step than the others' values."""
    numbers = []
    values = []
    for trial in study.trials(TrialState.PRUNED):
        if trial.last_step is None:
            continue
        value = trial.intermediate_values[trial.last_step]
        if math.isfinite(value):
            numbers.append(trial.number)
            values.append(value)
    if not numbers:
        return
    figure.add_scatter(
        x=numbers, y=values, name="pruned (last value)", mode="markers",
        marker={"symbol": "x", "size": 7, "color": GREY},
        hovertemplate="trial %{x}, pruned at %{y:.4f}<extra></extra>",
    )  # fmt: skip


def _first_objective(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def slices(study: Study, winner: int | None) -> go.Figure | None:
    """Draw the objective against each parameter.

    Args:
        study: the study.
        winner: number of the trial to highlight.

    Returns:
        The chart.
    """
    measured = comparable_trials(study.optuna)
    if len(measured) < 2:
        return None
    names = common_parameters([trial for trial, _ in measured])
    if not names:
        return None
    # A copy in which pruned trials are complete: Optuna's plot would leave them out.
    copy = study_of_values(measured, names, study.optuna.directions[0])
    figure = visualization.plot_slice(
        copy, target_name=describe_metric(study.objectives[0])
    )
    if not figure.data:
        return None
    set_style(figure)
    figure.update_traces(marker_colorscale=SCALE, marker_size=7)
    stars: list[go.Scatter] = []
    for points in figure.data:
        # Optuna's plot names trials by their positions in the copied study.
        numbers = [measured[position][0].number for position in points.marker.color]
        points.marker.color = numbers
        points.text = [f"trial {number}" for number in numbers]
        points.hovertemplate = "%{text}<br>%{x}: %{y:.4f}<extra></extra>"
        if winner in numbers:
            star = _winner_star(points, numbers.index(winner), is_first=not stars)
            stars.append(star)
    figure.add_traces(stars)
    return figure


def _winner_star(points: go.Scatter, index: int, is_first: bool) -> go.Scatter:
    """Build a star above one of the points of a slice; the first slice's has the legend's entry."""
    marker = {
        "symbol": "star", "size": 15, "color": GREEN,
        "line": {"color": "white", "width": 1},
    }  # fmt: skip
    return go.Scatter(
        x=[points.x[index]], y=[points.y[index]], xaxis=points.xaxis, yaxis=points.yaxis,
        mode="markers", marker=marker, name=f"winner ({points.text[index]})",
        legendgroup="winner", showlegend=is_first, hovertemplate=points.hovertemplate,
        text=[points.text[index]],
    )  # fmt: skip


def importance_bars(importance: Importance) -> go.Figure | None:
    """Draw the share of each parameter above the noise, and the noise as a line."""
    if not importance.influences:
        return None
    # Plotly puts the first bar at the bottom.
    shares = dict(reversed(importance.influences.items()))
    bars = go.Bar(
        x=list(shares.values()), y=[short_name(name) for name in shares],
        orientation="h", marker_color=BLUE, hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )  # fmt: skip
    title = "share of the differences between trials"
    figure = set_titles(go.Figure(bars), title, "")
    figure.add_vline(
        importance.threshold, line_dash="dot", annotation_text="pure noise",
        annotation_position="top",
    )  # fmt: skip
    height = 160 + 40 * len(shares)
    figure.update_layout(xaxis={"tickformat": ".0%", "range": [0, 1]}, height=height)
    return figure.update_yaxes(automargin=True)


def spending(study: Study, tokens: Mapping[int, int]) -> go.Figure | None:
    """Draw the number of tokens that each finished trial has trained, by its number."""
    # A trial that failed early, or whose folder is on another machine, has no tokens.
    trials = [trial for trial in study.finished() if tokens.get(trial.number)]
    if not trials:
        return None
    figure = go.Figure()
    for state, colour in STATES.items():
        numbers = [trial.number for trial in trials if trial.state == state]
        heights = [tokens[number] for number in numbers]
        if numbers:
            figure.add_bar(
                x=numbers, y=heights, name=state.name.lower(), marker_color=colour,
                hovertemplate="trial %{x}: %{y} tokens<extra></extra>",
            )  # fmt: skip
    return set_titles(figure, "trial", "tokens trained").update_layout(bargap=0.15)


def pareto_front(study: Study) -> go.Figure | None:
    """Draw trials by their two or three objectives, with the Pareto front highlighted."""
    finite = []
    for trial in study.trials(TrialState.COMPLETE):
        if all(math.isfinite(value) for value in trial.values):
            finite.append(trial)
    if len(study.objectives) not in (2, 3) or not finite:
        return None
    # A copy without the trials whose values are not finite, which have no place in the chart.
    copy = optuna.create_study(directions=study.optuna.directions)
    copy.add_trials(finite)
    figure = visualization.plot_pareto_front(
        copy, target_names=list(map(describe_metric, study.objectives))
    )
    for points in figure.data:
        # Optuna colours trials by their numbers, in two scales.
        is_front = points.marker.colorbar.title.text == "Best Trial"
        points.marker = {"color": GREEN if is_front else GREY, "size": 8}
        points.name = "on the Pareto front" if is_front else "dominated"
        if "Infeasible" in points.hovertemplate:
            points.name = "infeasible"
            points.marker.symbol = "x"
        points.showlegend = True
    return set_style(figure)


def seeds(confirmation: Mapping[str, Any]) -> go.Figure | None:
    """Draw each confirmed trial's objective with other seeds, and its mean.

    Args:
        confirmation: the content of `confirm.json`.

    Returns:
        The chart.
    """
    candidates = []
    for candidate in confirmation["candidates"]:
        if candidate["values"]:
            candidates.append(candidate)
    if not candidates:
        return None
    figure = go.Figure()
    for candidate in candidates:
        is_winner = candidate["trial"] == confirmation["winner"]
        _add_candidate(figure, candidate, is_winner)
    figure = set_titles(figure, describe_metric(confirmation["objective"]), "")
    height = 160 + 45 * len(candidates)
    # Plotly counts upwards: reversed, the first candidate is at the top.
    axis = {"autorange": "reversed", "automargin": True}
    return figure.update_layout(height=height, yaxis=axis)


def _add_candidate(
    figure: go.Figure, candidate: Mapping[str, Any], is_winner: bool
) -> None:
    """Add a candidate's values as dots, and their mean as a line."""
    name = f"trial {candidate['trial']}"
    if candidate["role"]:
        name += f" ({candidate['role']})"
    colour = ORANGE if candidate["role"] == "baseline" else BLUE
    if is_winner:
        colour = GREEN
    values = candidate["values"]
    figure.add_scatter(
        x=values, y=[name] * len(values), mode="markers", marker={"color": colour, "size": 9},
        opacity=0.6, showlegend=False, hovertemplate="%{x:.4f}<extra></extra>",
    )  # fmt: skip
    line = {"color": colour, "size": 22, "symbol": "line-ns-open", "line": {"width": 3}}
    figure.add_scatter(
        x=[candidate["mean"]], y=[name], mode="markers", marker=line, showlegend=False,
        hovertemplate="mean %{x:.4f}<extra></extra>",
    )  # fmt: skip
