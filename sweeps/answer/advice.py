"""What to do next, from a study's own data: two or three lines, each with the number that it rests on."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from sweeps.answer.importance import Share, comparable_trials, importances
from sweeps.study.formatting import format_value
from sweeps.study.study import Study, role

LEAST = 8
"""Trials needed before any advice."""


EARLY = "at the last rung that all trials reached"
"""What trials are compared by where some are pruned. It may be an early one, so it is said."""


EDGE = 0.15
"""The outer part of a range, in which trials are said to press against its bound."""


SURE = 0.01
"""How seldom chance alone may press so many of the best trials together."""


IDLE = 0.1
"""A parameter whose share is below this in nineteen of twenty resamples did not matter."""


WORTH = 0.1
"""A gain below this share of the spread (between the quartiles) is not worth more trials."""


MOST = 200
"""The Gaussian process is fitted to so many trials at most, the best ones."""


PLACES = 2048
"""Points of the space at which improvement is looked for."""


class Insight(NamedTuple):
    """What a study's own data say of it."""

    shares: Mapping[str, Share]
    advice: list[str]


def insight(study: Study) -> Insight:
    """What mattered, and what to do next."""
    shares = importances(study.optuna)
    return Insight(shares, advice(study, shares))


def advice(study: Study, shares: Mapping[str, Share]) -> list[str]:
    """Bounds that the best trials press against, parameters that did not matter, and whether more trials would help."""
    if len(study.objectives) > 1:
        return []
    pairs = _ranked(study, comparable_trials(study.optuna))
    if len(pairs) < LEAST:
        return []
    ends = [(trial, trial.value or 0.0) for trial, _ in pairs if trial.state == TrialState.COMPLETE]
    complete = _ranked(study, [(trial, value) for trial, value in ends if math.isfinite(value)])
    where = study.objectives[0]
    if any(role(trial) == "grid" for trial in study.trials()):
        gain = []  # it has the points that it has
    elif len(complete) >= LEAST:
        gain = _improvement(study, complete, where)
    else:
        gain = _improvement(study, pairs, f"{where} {EARLY}")
    judged = f" (judged {EARLY})" if any(trial.state == TrialState.PRUNED for trial, _ in pairs) else ""
    return [*(f"{line}{judged}" for line in [*_pressing(pairs), *_idle(pairs, shares)]), *gain]


def _ranked(study: Study, pairs: Sequence[tuple[FrozenTrial, float]]) -> list[tuple[FrozenTrial, float]]:
    """Trials with their costs, the best first."""
    return sorted(((trial, study.cost(value)) for trial, value in pairs), key=lambda pair: pair[1])


def _pressing(pairs: Sequence[tuple[FrozenTrial, float]]) -> list[str]:
    """Parameters of which the best quarter of the trials lies at one end."""
    from scipy.stats import binomtest

    best = [trial for trial, _ in pairs[: min(10, max(4, len(pairs) // 4))]]
    lines = []
    for name, what in _newest(pairs).items():
        places = [_place(what, trial.params[name]) for trial in best if name in trial.params]
        if isinstance(what, CategoricalDistribution):
            edge = (1 / len(what.choices)) if _is_ordered(what) and len(what.choices) > 2 else None
        else:
            edge = EDGE
        if edge is None or len(places) < len(best) or None in places:
            continue
        known = [place for place in places if place is not None]
        low, high = sum(place <= edge for place in known), sum(place >= 1 - edge for place in known)
        count, end = max((low, "lower"), (high, "upper"))
        beyond = _beyond(what, end)
        if beyond is not None and binomtest(count, len(best), edge, "greater").pvalue < SURE:
            where = f"the {end} end of {' … '.join(map(format_value, _ends(what)))}"
            lines.append(
                f"{name}: {count} of the best {len(best)} trials lie at {where}; search {format_value(beyond)} too"
            )
    return lines


def _newest(pairs: Sequence[tuple[FrozenTrial, float]]) -> dict[str, BaseDistribution]:
    """Each parameter's range as it is searched now: a study may have gone on with another."""
    trials = sorted((trial for trial, _ in pairs), key=lambda trial: trial.number)
    return {name: what for trial in trials for name, what in trial.distributions.items()}


def _idle(pairs: Sequence[tuple[FrozenTrial, float]], shares: Mapping[str, Share]) -> list[str]:
    """Parameters that may as well be fixed at the best trial's value."""
    best = pairs[0][0]
    idle = [name for name, share in shares.items() if share.high < IDLE and name in best.params]
    if not idle:
        return []
    said = ", ".join(f"{name} ({shares[name].share:.0%}, at most {shares[name].high:.0%})" for name in idle)
    fixed = " ".join(f"{name}={format_value(best.params[name])}" for name in idle)
    return [f"hardly mattered: {said}; fix with {fixed} and search fewer dimensions"]


def _improvement(study: Study, pairs: Sequence[tuple[FrozenTrial, float]], what: str) -> list[str]:
    """What the next trial can be expected to gain: expected improvement (Jones et al., 1998), the largest of the space.

    By a Gaussian process on the values that trials are compared by; better than its mean at the best trial counts,
    and only what is better in truth: the noise that it finds in the values is luck.
    """
    from scipy.stats import norm, qmc
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    pairs = pairs[:MOST]
    names = [name for name in pairs[0][0].params if all(name in trial.params for trial, _ in pairs)]
    ranges = _newest(pairs)
    columns = [_columns(ranges[name], [trial.params[name] for trial, _ in pairs]) for name in names]
    if not columns:
        return []
    known = np.concatenate(columns, axis=1)
    values = np.array([value for _, value in pairs])
    unit = float(values.std()) or 1.0
    width = known.shape[1]
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(width, 2.0), (0.2, 20.0), nu=2.5)
    process = GaussianProcessRegressor(kernel + WhiteKernel(1.0, (1e-4, 1.0)), random_state=0)
    drawn = qmc.Sobol(len(columns), seed=0).random(PLACES)
    places = np.concatenate([_spread(own, drawn[:, index]) for index, own in enumerate(columns)], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is a parameter without influence
        process.fit(known, (values - values.mean()) / unit)
        incumbent = float(process.predict(known).min())
        mean, deviation = process.predict(places, return_std=True)
    deviation = np.sqrt(np.maximum(deviation**2 - process.kernel_.k2.noise_level, 1e-12))
    gap = incumbent - mean
    expected = gap * norm.cdf(gap / deviation) + deviation * norm.pdf(gap / deviation)
    gain = float(expected.max()) * unit
    spread = float(np.quantile(values, 0.75) - np.quantile(values, 0.25)) or 1.0
    worth = gain > WORTH * spread
    total = len(study.trials()) * (1 if study.trials(TrialState.WAITING) else 2)
    more = f"hydra.sweeper.n_trials={total} goes on" if worth else "more trials would hardly help"
    by = f"{gain:.2g} ({gain / spread:.0%} of the spread)"
    return [f"the next trial can be expected to better {what} by {by}: {more}"]


def _place(what: BaseDistribution, value: object) -> float | None:
    """Where in its range a value lies, from 0 to 1; None where there is no order."""
    if isinstance(what, CategoricalDistribution):
        return what.choices.index(value) / max(len(what.choices) - 1, 1) if _is_ordered(what) else None
    assert isinstance(what, IntDistribution | FloatDistribution)
    assert isinstance(value, int | float)
    if what.log and value <= 0:
        return None  # from before the range was logarithmic
    low, high, own = (math.log(x) if what.log else float(x) for x in (what.low, what.high, value))
    return (own - low) / (high - low) if high > low else None


def _is_ordered(what: CategoricalDistribution) -> bool:
    """Whether choices are rising numbers."""
    numbers = [choice for choice in what.choices if isinstance(choice, int | float) and not isinstance(choice, bool)]
    return len(numbers) == len(what.choices) and numbers == sorted(numbers)


def _columns(what: BaseDistribution, values: Sequence[object]) -> np.ndarray:
    """A parameter as numbers, its range from 0 to 1: one column, or one for each choice where there is no order."""
    places = [_place(what, value) for value in values]
    if None not in places:
        return np.array(places, dtype=float)[:, None]
    choices = sorted({str(value) for value in values})
    return np.array([[float(str(value) == choice) for choice in choices] for value in values])


def _spread(columns: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Values of a parameter, as `_columns` has them, for numbers drawn from 0 to 1."""
    if columns.shape[1] == 1:
        return drawn[:, None]
    kinds: np.ndarray = np.unique(columns, axis=0)
    chosen: np.ndarray = kinds[(drawn * len(kinds)).astype(int)]
    return chosen


def _ends(what: BaseDistribution) -> tuple[float, float]:
    """Of a range, or of choices that have an order."""
    if isinstance(what, CategoricalDistribution):
        return what.choices[0], what.choices[-1]  # type: ignore[return-value]
    assert isinstance(what, IntDistribution | FloatDistribution)
    return what.low, what.high


def _beyond(what: BaseDistribution, end: str) -> float | None:
    """A value beyond an end: twice as far among choices, thrice on a logarithmic scale, else half the range further.

    Whole numbers stay whole and shares below 1. None where nothing is to be searched: below 0, or at 0 of what counts.
    """
    low, high = _ends(what)
    is_choice, is_log = isinstance(what, CategoricalDistribution), getattr(what, "log", False)
    factor = 2 if is_choice else 3 if is_log else None
    if factor is not None:
        value = high * factor if end == "upper" else low / factor
    elif end == "upper":
        value = high + (high - low) / 2 if high >= 1 else min(high + (high - low) / 2, (1 + high) / 2)
    else:
        value = low - (high - low) / 2
        value = max(value, 0.0) if low >= 0 else value
    if isinstance(low, int):
        value = round(value)
    return None if value == (high if end == "upper" else low) or (isinstance(low, int) and value == 0) else value
