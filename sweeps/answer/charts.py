"""A study's charts, by Optuna's plots and plotly. Each is None where there is too little to draw."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from sweeps.answer.importance import Share, comparable_trials, study_of_values
from sweeps.study.formatting import parameters, short_name
from sweeps.study.study import Study

BLUE, ORANGE, GREY, RED, GREEN, VIOLET = "#2563eb", "#d97706", "#94a3b8", "#dc2626", "#059669", "#7c3aed"


STATES = {
    TrialState.PRUNED: GREY,
    TrialState.COMPLETE: BLUE,
    TrialState.FAIL: RED,
    TrialState.RUNNING: VIOLET,
}


Curve = list[tuple[float, float]]
"""A trial's evaluations: step and objective."""


def learning_curves(study: Study, curves: Mapping[int, Curve], winner: int | None) -> go.Figure | None:
    """The objective at every evaluation of every trial; a cross is the last one of a pruned trial."""
    trials = {trial.number: trial for trial in study.trials()}
    drawn = {number: curve for number, curve in curves.items() if curve}
    if not drawn:
        return None
    baseline = study.baseline()
    special = {winner: ("the winner", GREEN), baseline.number if baseline else None: ("the baseline", ORANGE)}
    figure = go.Figure()
    for state, colour in STATES.items():
        own = [number for number in drawn if trials[number].state == state and number not in special]
        if own:
            lines = [(trials[number], drawn[number]) for number in own]
            figure.add_trace(_lines(lines, state.name.lower(), colour, 1.2))
    pruned = [number for number in drawn if trials[number].state == TrialState.PRUNED]
    ends = [(trials[number], drawn[number][-1:]) for number in pruned]
    if ends:
        crosses = _lines(ends, "pruned after this", GREY, 1)
        figure.add_trace(crosses.update(mode="markers", marker={"symbol": "x", "size": 7, "color": GREY}))
    for number, (name, colour) in special.items():
        if number in drawn:
            figure.add_trace(_lines([(trials[number], drawn[number])], name, colour, 3))
    steps = "optimizer step" if _equally_long(trials.values()) else "share of the trial's steps"
    return _titled(figure, steps, study.objectives[0])


def _lines(pairs: Sequence[tuple[FrozenTrial, Curve]], name: str, colour: str, width: float) -> go.Scatter:
    """Many trials' curves as one trace, with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for trial, curve in pairs:
        x += [*(step for step, _ in curve), None]
        y += [*(value for _, value in curve), None]
        text += [*([f"trial {trial.number}: {parameters(trial)}"] * len(curve)), None]
    mode = "lines+markers" if all(len(curve) < 30 for _, curve in pairs) else "lines"
    return go.Scatter(
        x=x, y=y, text=text, name=name, mode=mode, line={"color": colour, "width": width}, marker={"size": 4},
        hovertemplate="%{text}<br>%{y:.4f}<extra></extra>", connectgaps=False,
        opacity=0.35 if len(pairs) > 50 else 1,
    )  # fmt: skip


def _equally_long(trials: Any) -> bool:
    return len({trial.user_attrs["steps"] for trial in trials if "steps" in trial.user_attrs}) <= 1


def curves_of(study: Study, logged: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, Curve]:
    """Each trial's curve from what it has logged; of one whose folder is elsewhere from what it has reported."""
    name, trials = study.objectives[0], study.trials()
    equal, found = _equally_long(trials), {}
    for trial in trials:
        steps = trial.user_attrs.get("steps") or 1
        rows = [(row["step"], row.get(name)) for row in logged.get(trial.number, ()) if name in row]
        if not rows:
            rungs = max((max(other.intermediate_values, default=0) for other in trials), default=0) or 1
            rows = [(rung * steps / rungs, value) for rung, value in trial.intermediate_values.items()]
        finite = [(step, value) for step, value in rows if value is not None and math.isfinite(value)]
        found[trial.number] = [(step if equal else step / steps, value) for step, value in finite]
    return found


def history(study: Study) -> go.Figure | None:
    """The objective of trial after trial, and the best so far."""
    if not any(math.isfinite(trial.values[0]) for trial in study.trials(TrialState.COMPLETE)):
        return None
    plot, name = visualization.plot_optimization_history, study.objectives[0]
    several = len(study.objectives) > 1
    return _plain(plot(study.optuna, target=_first if several else None, target_name=name))


def parallel_coordinates(study: Study) -> go.Figure | None:
    """Each trial as a line through its parameters, coloured by its objective."""
    return _compared(study, visualization.plot_parallel_coordinate)


def slices(study: Study) -> go.Figure | None:
    """The objective against each parameter."""
    return _compared(study, visualization.plot_slice)


def _first(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def _compared(study: Study, plot: Callable[..., go.Figure]) -> go.Figure | None:
    """One of Optuna's plots of the trials that can be compared, with the parameters that all of them have."""
    pairs = comparable_trials(study.optuna)
    if len(pairs) < 2:
        return None
    names = [name for name in pairs[0][0].params if all(name in trial.params for trial, _ in pairs)]
    if not names:
        return None
    return _plain(plot(study_of_values(pairs, names, study.optuna.directions[0]), target_name=study.objectives[0]))


def importance_bars(shares: Mapping[str, Share]) -> go.Figure | None:
    """What each parameter explains, with the interval that nine of ten resamples lie in."""
    if not shares:
        return None
    names = list(shares)[::-1]
    own = [shares[name] for name in names]
    error = {
        "type": "data", "symmetric": False, "color": "#475569",
        "array": [max(share.high - share.share, 0) for share in own],
        "arrayminus": [max(share.share - share.low, 0) for share in own],
    }  # fmt: skip
    bars = go.Bar(
        x=[share.share for share in own], y=[short_name(name) for name in names], orientation="h", error_x=error,
        marker_color=BLUE, hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )  # fmt: skip
    figure = _titled(go.Figure(bars), "share of the objective's variation", "")
    figure.update_layout(xaxis={"tickformat": ".0%", "range": [0, 1]}, height=160 + 40 * len(names))
    return figure.update_yaxes(automargin=True)


def spending(study: Study, tokens: Mapping[int, int]) -> go.Figure | None:
    """Tokens that each trial has trained."""
    trials = [trial for trial in study.finished() if tokens.get(trial.number)]
    if not trials:
        return None
    figure = go.Figure()
    for state, colour in STATES.items():
        own = [trial for trial in trials if trial.state == state]
        if own:
            numbers = [trial.number for trial in own]
            figure.add_bar(
                x=numbers, y=[tokens[number] for number in numbers], name=state.name.lower(), marker_color=colour,
                hovertemplate="trial %{x}: %{y} tokens<extra></extra>",
            )  # fmt: skip
    return _titled(figure, "trial", "tokens trained").update_layout(bargap=0.15)


def pareto_front(study: Study) -> go.Figure | None:
    """Trials by their several objectives; those that nothing beats in all of them stand out."""
    count = len(study.objectives)
    if count not in (2, 3) or not study.trials(TrialState.COMPLETE):
        return None
    copy = optuna.create_study(directions=study.optuna.directions)
    complete = [trial for trial in study.trials(TrialState.COMPLETE) if all(map(math.isfinite, trial.values))]
    if not complete:
        return None
    copy.add_trials(complete)
    return _plain(visualization.plot_pareto_front(copy, target_names=study.objectives))


def seeds(found: Mapping[str, Any]) -> go.Figure | None:
    """What each confirmed trial has come to with other seeds."""
    rows = [row for row in found["candidates"] if row["values"]]
    if not rows:
        return None
    figure = go.Figure()
    for row in rows:
        name = f"trial {row['trial']}" + (f" ({row['role']})" if row["role"] else "")
        colour = GREEN if row["trial"] == found["winner"] else ORANGE if row["role"] == "baseline" else BLUE
        figure.add_scatter(
            x=row["values"], y=[name] * len(row["values"]), mode="markers", marker={"color": colour, "size": 9},
            opacity=0.6, showlegend=False, hovertemplate="%{x:.4f}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[row["mean"]], y=[name], mode="markers", showlegend=False, hovertemplate="mean %{x:.4f}<extra></extra>",
            marker={"color": colour, "size": 22, "symbol": "line-ns-open", "line": {"width": 3}},
        )  # fmt: skip
    figure = _titled(figure, found["objective"], "")
    return figure.update_layout(height=160 + 45 * len(rows), yaxis={"autorange": "reversed", "automargin": True})


def _titled(figure: go.Figure, x: str, y: str) -> go.Figure:
    return _plain(figure).update_layout(xaxis_title=x, yaxis_title=y)


def _plain(figure: go.Figure) -> go.Figure:
    """The report's own looks: the headings stand outside of the charts."""
    return figure.update_layout(
        template="plotly_white", title=None, width=None, autosize=True, height=420,
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.08},
        font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
