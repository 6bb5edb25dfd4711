"""Replays a study on curves: its trials report in slots, and the real pruner judges them.

The trials that report at the same step all report before one is judged, and each trial is judged
again by its last rung when others report. The first is the baseline, which is never pruned. No
trial is judged at a rung within the warm-up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
from curves import Curve
from optuna.trial import TrialState

from sweeps.space.pruners import WARMUP_RUNG

ROUNDING = 1e-6
"""Error of a sum of steps, where evaluations take a part of one."""


@dataclass
class Live:
    """A trial in a slot."""

    curve: Curve
    trial: optuna.Trial
    begin: float
    """Steps that its slot had trained before."""
    evaluation_steps: float
    """Duration of an evaluation, in steps."""
    reported: int = 0
    """Number of its evaluations that have been reported."""
    judged: bool = False
    """Whether it has reported a rung after its warm-up."""

    @property
    def next_report(self) -> float:
        evaluations = (self.reported + 1) * self.evaluation_steps
        return self.begin + self.curve.steps[self.reported] + evaluations


@dataclass
class Replay:
    """What came of a study's replay."""

    complete: list[Curve] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    """Steps of all trials, up to when each complete one ended."""
    steps: float = 0
    """Steps of all trials, with their evaluations where these count."""


def replay(
    study: optuna.Study,
    begin_trial: Callable[[], tuple[Curve, optuna.Trial] | None],
    slots: int,
    warmup: float = 0.0,
    budget: float = math.inf,
    evaluation_steps: float = 0.0,
) -> Replay:
    """Replay one study.

    Args:
        study: the study, with its pruner.
        begin_trial: returns the next trial and its run; None: there is none.
        slots: trials that train at once.
        warmup: share of a run's steps before whose end no rung judges.
        budget: steps after which the study ends, with its running trials.
        evaluation_steps: duration of an evaluation, in steps.
    """
    outcome = Replay()
    live: list[Live] = []
    clock = 0.0
    finished_steps = 0.0
    while True:
        while len(live) < slots:
            begun = begin_trial()
            if begun is None:
                break
            live.append(Live(*begun, clock, evaluation_steps))
        if not live:
            break
        clock = min(run.next_report for run in live)
        reporting = [run for run in live if run.next_report <= clock + ROUNDING]
        steps = finished_steps + sum(clock - run.begin for run in live)
        if steps > budget + ROUNDING:
            break
        outcome.steps = steps
        for run in reporting:
            report(run, warmup)
        for run in list(live):
            if is_ended(study, run):
                finished_steps += clock - run.begin
                live.remove(run)
                if run.reported == len(run.curve.steps):
                    outcome.complete.append(run.curve)
                    outcome.spent.append(steps)
    return outcome


def report(run: Live, warmup: float) -> None:
    """Report a run's next evaluation, as this project's studies do."""
    curve, number = run.curve, run.reported
    run.reported += 1
    if curve.steps[number] < math.ceil(warmup * curve.total):
        run.trial.set_user_attr(WARMUP_RUNG, curve.rungs[number])
    else:
        run.judged = True
    run.trial.report(curve.values[number], curve.rungs[number])


def is_ended(study: optuna.Study, run: Live) -> bool:
    """Tell the study of a trial that is complete or pruned; return whether it is."""
    if run.reported == len(run.curve.steps):
        if math.isnan(run.curve.values[-1]):
            study.tell(run.trial, state=TrialState.FAIL)
        else:
            study.tell(run.trial, run.curve.values[-1])
        return True
    # Asked for the baseline, too: Optuna's pruner notes whom it has judged.
    if run.judged and run.trial.should_prune() and run.trial.number > 0:
        study.tell(run.trial, state=TrialState.PRUNED)
        return True
    return False


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """Return a mean with its standard error; nan where a value is missing."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):{sign}.3f} ± {error:.3f}"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
