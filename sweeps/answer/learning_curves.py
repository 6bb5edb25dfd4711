"""Learning curves: the objective of every trial at each of its evaluations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from finetune.metrics.names import describe_metric
from sweeps.answer.chart_style import GREEN, GREY, ORANGE, STATES, set_titles
from sweeps.study.formatting import format_parameters
from sweeps.study.study import Study

Curve = list[tuple[float, float]]
"""Evaluations of a trial: optimizer step (or share of its steps) and objective."""


TrialCurve = tuple[FrozenTrial, Curve]


MAX_POINTS_WITH_MARKERS = 30
"""From this number of evaluations on, markers would hide the line."""


MAX_OPAQUE_CURVES = 50
"""More curves are translucent, so that they can be told apart where they overlap."""


def learning_curves(
    study: Study, curves: Mapping[int, Curve], winner: int | None
) -> go.Figure | None:
    """Draw the objective at every evaluation; a cross marks where a trial was pruned.

    Args:
        study: the study.
        curves: curve of each trial by number, as `curves_of` returns them.
        winner: number of the trial to highlight.

    Returns:
        The chart; None if no trial has an evaluation.
    """
    trials = study.trials()
    trial_curves: dict[int, TrialCurve] = {}
    for trial in trials:
        curve = curves.get(trial.number)
        if curve:
            trial_curves[trial.number] = (trial, curve)
    if not trial_curves:
        return None
    highlights = _highlights(study, winner)
    ordinary = []
    for number, trial_curve in trial_curves.items():
        if number not in highlights:
            ordinary.append(trial_curve)
    figure = go.Figure(_state_traces(ordinary))
    pruned = _in_state(trial_curves.values(), TrialState.PRUNED)
    if pruned:
        figure.add_trace(_crosses_trace(pruned))
    # Last, so that they lie above all other curves.
    for number, (name, colour) in highlights.items():
        if number in trial_curves:
            trace = _curves_trace(
                [trial_curves[number]],
                name,
                colour,
                3,
            )
            figure.add_trace(trace)
    axis = "share of the trial's steps"
    if _have_equal_steps(trials):
        axis = "optimizer step"
    return set_titles(figure, axis, describe_metric(study.objectives[0]))


def _highlights(study: Study, winner: int | None) -> dict[int, tuple[str, str]]:
    """Return name and colour of the winner's and the baseline's curve, by their numbers."""
    highlights = {}
    if winner is not None:
        highlights[winner] = ("winner", GREEN)
    baseline = study.baseline()
    if baseline is not None:
        highlights[baseline.number] = ("baseline", ORANGE)
    return highlights


def _in_state(
    trial_curves: Iterable[TrialCurve], state: TrialState
) -> list[TrialCurve]:
    return [(trial, curve) for trial, curve in trial_curves if trial.state == state]


def _state_traces(trial_curves: Sequence[TrialCurve]) -> list[go.Scatter]:
    """Draw the curves of each state in its colour."""
    traces = []
    for state, colour in STATES.items():
        in_state = _in_state(trial_curves, state)
        if in_state:
            traces.append(
                _curves_trace(
                    in_state,
                    state.name.lower(),
                    colour,
                    1.2,
                )
            )
    return traces


def _crosses_trace(pruned: Sequence[TrialCurve]) -> go.Scatter:
    """Mark the last evaluation of each pruned trial."""
    ends = [(trial, curve[-1:]) for trial, curve in pruned]
    marker = {"symbol": "x", "size": 7, "color": GREY}
    trace = _curves_trace(ends, "pruned after this", GREY, 1)
    return trace.update(mode="markers", marker=marker)


def _curves_trace(
    trial_curves: Sequence[TrialCurve],
    name: str,
    colour: str,
    width: float,
) -> go.Scatter:
    """Combine the curves of many trials in one trace, with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for trial, curve in trial_curves:
        description = f"trial {trial.number}: {format_parameters(trial)}"
        for step, value in curve:
            x.append(step)
            y.append(value)
            text.append(description)
        # A point without coordinates: plotly draws no line from one trial's curve to the next.
        x.append(None)
        y.append(None)
        text.append(None)
    longest = max(len(curve) for _, curve in trial_curves)
    return go.Scatter(
        x=x, y=y, text=text, name=name, connectgaps=False,
        mode="lines+markers" if longest < MAX_POINTS_WITH_MARKERS else "lines",
        line={"color": colour, "width": width}, marker={"size": 4},
        hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
        opacity=0.35 if len(trial_curves) > MAX_OPAQUE_CURVES else 1,
    )  # fmt: skip


def _have_equal_steps(trials: Iterable[FrozenTrial]) -> bool:
    steps = set()
    for trial in trials:
        if "steps" in trial.user_attrs:
            steps.add(trial.user_attrs["steps"])
    return len(steps) <= 1


def curves_of(
    study: Study, metrics: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[int, Curve]:
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
    last_rung = _last_rung(trials)
    curves: dict[int, Curve] = {}
    for trial in trials:
        # A trial stores its number of steps at its first evaluation.
        steps = trial.user_attrs.get("steps") or 1
        points = []
        for line in metrics.get(trial.number, ()):
            if objective in line:
                points.append((line["step"], line[objective]))
        if not points:
            # Estimated: rungs are equally spaced, unless `trainer.eval_steps` is a list.
            for rung, value in trial.intermediate_values.items():
                points.append((rung * steps / last_rung, value))
        curve: Curve = []
        for step, value in points:
            if value is None or not math.isfinite(value):
                continue
            if not have_equal_steps:
                step /= steps
            curve.append((step, value))
        curves[trial.number] = curve
    return curves


def _last_rung(trials: Iterable[FrozenTrial]) -> int:
    """Return the last rung that any trial has reported; 1 if there is none."""
    rungs = [rung for trial in trials for rung in trial.intermediate_values]
    return max(rungs, default=0) or 1
