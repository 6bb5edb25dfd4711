"""Advice on how to continue a study, from its own trials: each line names the number behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial
from scipy.stats import hypergeom

from sweeps.answer.importance import (
    Importance,
    comparable_trials,
    importances,
    rung_of_comparison,
)
from sweeps.answer.more_trials import more_trials_lines, rank
from sweeps.answer.ranges import (
    End,
    bounds,
    is_ordered,
    newest_distributions,
    position,
    value_beyond,
)
from sweeps.study.formatting import format_value
from sweeps.study.study import Study

MIN_TRIALS = 8
"""Measured trials that are needed before any advice."""


MIN_BEST = 4
"""Least number of best trials that are looked at for bounds."""


BEST_PART = 3
"""The best third of the trials is looked at for bounds."""


EDGE = 0.2
"""Share of a range, at each end, in which a trial counts as close to the bound."""


SIGNIFICANCE = 0.025
"""Largest probability, for each end, that so many of the best trials are there by chance."""


@dataclass(frozen=True)
class Analysis:
    """What the trials of a study show."""

    importance: Importance
    advice: list[str]


def analyze(study: Study) -> Analysis:
    """Compute the importance of each parameter, and the advice."""
    return Analysis(importances(study.optuna), advise(study))


def advise(study: Study) -> list[str]:
    """Give advice on bounds and on more trials.

    Returns:
        One line for each piece of advice; none with several objectives, or with too few trials.
    """
    if len(study.objectives) > 1:
        return []
    ranked = rank(study, comparable_trials(study.optuna))
    if len(ranked) < MIN_TRIALS:
        return []
    rung = rung_of_comparison(study.optuna)
    lines = _bound_lines([trial for trial, _ in ranked])
    if rung:
        lines = [f"{line} (measured at {rung})" for line in lines]
    ended = [study.ended] if study.ended else []
    return [*ended, *lines, *more_trials_lines(study, ranked)]


def _bound_lines(ranked: Sequence[FrozenTrial]) -> list[str]:
    """Name the parameters whose best values are close to a bound, and a value beyond it."""
    lines = []
    for name, distribution in newest_distributions(ranked).items():
        pressed = _pressed_end(distribution, ranked, name)
        if pressed is None:
            continue
        extension = value_beyond(distribution, pressed.end)
        if extension is not None:
            low, high = bounds(distribution)
            interval = f"{format_value(low)} … {format_value(high)}"
            lines.append(
                f"{name}: {pressed.best_there} of the best {pressed.best} trials are at the "
                f"{pressed.end} end of {interval}, but {pressed.there} of all {len(ranked)}; "
                f"extend it to {format_value(extension)}"
            )
    return lines


@dataclass(frozen=True)
class _PressedEnd:
    """An end of a range that good trials have come to more often than all trials."""

    end: End
    best: int
    """Number of best trials."""
    best_there: int
    """Number of best trials at this end."""
    there: int
    """Number of all trials at this end."""


def _pressed_end(
    distribution: BaseDistribution, ranked: Sequence[FrozenTrial], name: str
) -> _PressedEnd | None:
    """Find the end of a range at which more of the best trials are than chance explains.

    By the hypergeometric test: if values had nothing to do with the result, the best trials would
    be as any trials of the study. Samplers such as TPE crowd at an end by themselves, which counts
    for nothing here. Each end is tested at half of 5 %. Simulated with 20 and 40 trials, by TPE or
    uniform, an end was named in 1 to 4 % of studies for a parameter without influence. Where the
    objective fell up to the bound it was named in 82 to 99 % of studies of 40 trials, and in 55 to
    72 % of 20.

    Returns:
        The end and its trials; None if there is none.
    """
    edge = _edge_width(distribution)
    if edge is None:
        return None
    positions = []
    for trial in ranked:
        relative_position = None
        if name in trial.params:
            relative_position = position(distribution, trial.params[name])
        if relative_position is None:
            return None
        positions.append(relative_position)
    best = max(MIN_BEST, len(ranked) // BEST_PART)
    at_ends: dict[End, list[bool]] = {
        "lower": [at <= edge for at in positions],
        "upper": [at >= 1 - edge for at in positions],
    }
    for end, is_there in at_ends.items():
        pressed = _PressedEnd(end, best, sum(is_there[:best]), sum(is_there))
        # The probability of as many of the best trials, or more, at this end.
        probability = hypergeom.sf(
            pressed.best_there - 1, len(ranked), pressed.there, best
        )
        if probability <= SIGNIFICANCE:
            return pressed
    return None


def _edge_width(distribution: BaseDistribution) -> float | None:
    """Return the share of a range that counts as an edge; None if it has no ends."""
    if not isinstance(distribution, CategoricalDistribution):
        return EDGE
    # Of two choices, each is at an end.
    if is_ordered(distribution) and len(distribution.choices) > 2:
        return 1 / len(distribution.choices)
    return None
