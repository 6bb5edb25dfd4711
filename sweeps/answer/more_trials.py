"""Whether more trials would help, said to the user, and as a rule that ends a study."""

import math
from collections.abc import Iterable, Sequence

from optuna.trial import FrozenTrial, TrialState

from finetune.metrics.names import describe_metric
from finetune.quantities import counted
from sweeps.answer.gain import Gain, simulate_gain
from sweeps.answer.importance import (
    MeasuredTrial,
    comparable_trials,
    rung_of_comparison,
)
from sweeps.space.feasibility import is_feasible
from sweeps.study.roles import GRID, role
from sweeps.study.study import Study

MIN_TRIALS_FOR_GAIN = 20
"""Measured trials that are needed to say whether more help: with 8, any rule is a guess."""


MAX_MORE = 40
"""Largest number of further trials that is proposed and simulated."""


def rank(study: Study, measured: Iterable[MeasuredTrial]) -> list[MeasuredTrial]:
    """Replace values by costs (less is better) and sort the feasible trials, the best first."""
    costs = [
        (trial, study.to_cost(value)) for trial, value in measured if is_feasible(trial)
    ]
    return sorted(costs, key=lambda pair: pair[1])


def more_trials_lines(study: Study, ranked: Sequence[MeasuredTrial]) -> list[str]:
    """Say what more trials would bring; nothing for a grid or a multirun: their points are fixed.

    "Hardly help" means that a gain of a tenth of the trials' spread has a probability below 0.3.
    Simulated with TPE on 14 surfaces, that was right in 82 of 100 studies of 20 trials and in all
    40 studies of 40 trials of which it was said. The mean gain was 0.8 times the true one with 20
    trials and 1.2 times with 40; the interval held the gain of 80 of 100 continuations.

    Args:
        study: the study.
        ranked: trials with their costs, the best first.

    Returns:
        One line, or none.
    """
    if any(role(trial) == GRID for trial in study.trials()):
        return []
    measured, rung = _measured(study, ranked)
    if len(measured) < MIN_TRIALS_FOR_GAIN:
        trials = counted(len(measured), "trial")
        needed = f"not known from {trials} (needs {MIN_TRIALS_FOR_GAIN})"
        return [f"whether more trials would help is {needed}"]
    begun = len(study.trials()) - len(study.trials(TrialState.WAITING))
    total = _larger_total(study)
    gain = simulate_gain(measured, min(total - begun, MAX_MORE), study.sampler)
    if gain is None:
        return []
    line = describe_gain(gain, study.objectives[0]) + rung
    if gain.may_help:
        line += f"; {_continuation(study, total)}"
    return [line]


def no_gain(study: Study) -> str | None:
    """Decide whether a study ends itself, by `hydra.sweeper.stop_when=no_gain`.

    It does if even as many more trials as it has measured would hardly help.

    Args:
        study: the study, with one objective.

    Returns:
        Why it ends; None: it goes on.
    """
    ranked = rank(study, comparable_trials(study.optuna))
    measured, rung = _measured(study, ranked)
    if len(measured) < MIN_TRIALS_FOR_GAIN:
        return None
    more = min(len(measured), MAX_MORE)
    gain = simulate_gain(measured, more, study.sampler)
    if gain is None or gain.may_help:
        return None
    return describe_gain(gain, study.objectives[0]) + rung


def describe_gain(gain: Gain, objective: str) -> str:
    """Say in one line what more trials bring, and when that would be worthwhile."""
    verdict = "may help" if gain.may_help else "would hardly help"
    interval = f"{gain.low:.2g} to {gain.high:.2g} in 8 of 10 simulated continuations"
    name = describe_metric(objective)
    return (
        f"{counted(gain.more, 'more trial')} {verdict}: {name} better by {gain.mean:.2g} on "
        f"average ({interval}; a tenth of the trials' spread is {gain.worthwhile:.2g})"
    )


def _measured(
    study: Study, ranked: Sequence[MeasuredTrial]
) -> tuple[Sequence[MeasuredTrial], str]:
    """Return the trials by final values, if enough are complete, or else by a common rung's.

    Returns:
        The trials, the best first, and a note that names the rung; empty for final values.
    """
    complete = rank(study, _final_values(trial for trial, _ in ranked))
    if len(complete) >= MIN_TRIALS_FOR_GAIN:
        return complete, ""
    rung = rung_of_comparison(study.optuna)
    return ranked, f" (at {rung})" if rung else ""


def _final_values(trials: Iterable[FrozenTrial]) -> list[MeasuredTrial]:
    """Pair complete trials with their finite final values."""
    measured = []
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            value = trial.value or 0.0
            if math.isfinite(value):
                measured.append((trial, value))
    return measured


def _continuation(study: Study, total: int) -> str:
    """Say which setting lets the study go on to a total of trials."""
    if study.total is not None:
        return f"continue with hydra.sweeper.n_trials={total - study.added_count}"
    if study.max_tokens is not None:
        return f"continue with hydra.sweeper.max_tokens={2 * study.max_tokens}"
    return "the same command goes on"


def _larger_total(study: Study) -> int:
    """Return the trial count to continue with: all that wait already, or up to twice as many."""
    total = len(study.trials())
    if study.trials(TrialState.WAITING):
        return total
    return total + min(total, MAX_MORE)
