"""Learning curves: the objective of every trial at each of its evaluations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from sweeps.answer.chart_style import GREEN, GREY, ORANGE, STATES, set_titles
from sweeps.study.formatting import format_parameters
from sweeps.study.study import Study

Curve = list[tuple[float, float]]
"""Evaluations of a trial: optimizer step (or share of its steps) and objective."""


TrialCurve = tuple[FrozenTrial, Curve]


def learning_curves(
    study: Study, curves: Mapping[int, Curve], winner: int | None
) -> go.Figure | None:
    """Draw the objective at every evaluation; a cross marks where a trial was pruned.

    Args:
        study: the study.
        curves: curve of each trial by number, as `curves_of` returns them.
        winner: number of the trial to highlight.

    Returns:
        The chart.
    """
    trials = {trial.number: trial for trial in study.trials()}
    drawn = [(trials[number], curve) for number, curve in curves.items() if curve]
    if not drawn:
        return None
    baseline = study.baseline()
    highlights = {
        winner: ("winner", GREEN),
        baseline.number if baseline else None: ("baseline", ORANGE),
    }
    ordinary = [pair for pair in drawn if pair[0].number not in highlights]
    figure = go.Figure(_state_traces(ordinary))
    pruned = [pair for pair in drawn if pair[0].state == TrialState.PRUNED]
    if pruned:
        figure.add_trace(_crosses_trace(pruned))
    by_number = {trial.number: (trial, curve) for trial, curve in drawn}
    for number, (name, colour) in highlights.items():
        if number in by_number:
            figure.add_trace(_curves_trace([by_number[number]], name, colour, 3))
    steps = "optimizer step" if _have_equal_steps(trials.values()) else "share of the trial's steps"
    return set_titles(figure, steps, study.objectives[0])


def _state_traces(pairs: Sequence[TrialCurve]) -> list[go.Scatter]:
    """Draw the curves of each state in its colour."""
    traces = []
    for state, colour in STATES.items():
        in_state = [pair for pair in pairs if pair[0].state == state]
        if in_state:
            traces.append(_curves_trace(in_state, state.name.lower(), colour, 1.2))
    return traces


def _crosses_trace(pruned: Sequence[TrialCurve]) -> go.Scatter:
    """Mark the last evaluation of each pruned trial."""
    ends = [(trial, curve[-1:]) for trial, curve in pruned]
    marker = {"symbol": "x", "size": 7, "color": GREY}
    trace = _curves_trace(ends, "pruned after this", GREY, 1)
    return trace.update(mode="markers", marker=marker)


def _curves_trace(pairs: Sequence[TrialCurve], name: str, colour: str, width: float) -> go.Scatter:
    """Combine the curves of many trials in one trace, with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for trial, curve in pairs:
        x += [*(step for step, _ in curve), None]
        y += [*(value for _, value in curve), None]
        text += [*([f"trial {trial.number}: {format_parameters(trial)}"] * len(curve)), None]
    mode = "lines+markers" if all(len(curve) < 30 for _, curve in pairs) else "lines"
    return go.Scatter(
        x=x, y=y, text=text, name=name, mode=mode, connectgaps=False,
        line={"color": colour, "width": width}, marker={"size": 4},
        hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
        opacity=0.35 if len(pairs) > 50 else 1,
    )  # fmt: skip


def _have_equal_steps(trials: Iterable[FrozenTrial]) -> bool:
    steps = {trial.user_attrs["steps"] for trial in trials if "steps" in trial.user_attrs}
    return len(steps) <= 1


def curves_of(study: Study, metrics: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, Curve]:
    """Read each trial's curve from its metrics.

    Args:
        study: the study.
        metrics: the lines of each trial's `metrics.jsonl` by number. A trial without lines, whose
            folder is on another machine, gets its curve from the rungs that it reported.

    Returns:
        The curve of each trial, without values that are not finite. If trials differ in their
        number of steps, a step is a share of the trial's steps.
    """
    objective = study.objectives[0]
    trials = study.trials()
    have_equal_steps = _have_equal_steps(trials)
    last_rung = max((max(trial.intermediate_values, default=0) for trial in trials), default=0) or 1
    curves: dict[int, Curve] = {}
    for trial in trials:
        steps = trial.user_attrs.get("steps") or 1
        lines = metrics.get(trial.number, ())
        points = [(line["step"], line[objective]) for line in lines if objective in line]
        if not points:
            reported = trial.intermediate_values.items()
            points = [(rung * steps / last_rung, value) for rung, value in reported]
        curve: Curve = []
        for step, value in points:
            if value is not None and math.isfinite(value):
                curve.append((step if have_equal_steps else step / steps, value))
        curves[trial.number] = curve
    return curves
