"""Which trials meet the constraints: those of `hydra.sweeper.constraints`, and of a sampler."""

from collections import Counter
from collections.abc import Iterable, Mapping

import optuna
from optuna.trial import FrozenTrial


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial violates no constraint, as far as they are known of it."""
    return all(distance <= 0 for distance in trial.constraints.values())


def violated(trial: FrozenTrial) -> list[str]:
    """Return the constraints that a trial violates, as the user wrote them."""
    names = []
    for name, distance in trial.constraints.items():
        if distance > 0:
            # A sampler's function has no texts, but positions.
            names.append(f"constraint {name}" if name.isdigit() else name)
    return names


def store_violations(trial: optuna.Trial, distances: Mapping[str, float]) -> None:
    """Store how far a trial is beyond its bounds, from which samplers learn."""
    for name, distance in distances.items():
        # Optuna stores each once; an adopted trial has them already.
        if name not in trial.constraints:
            trial.set_constraint(name, distance)


def why_no_winner(trials: Iterable[FrozenTrial]) -> str:
    """Say why none of a study's trials can win."""
    infeasible = [trial for trial in trials if not is_feasible(trial)]
    if not infeasible:
        return "no trial is complete yet"
    counts = Counter(name for trial in infeasible for name in violated(trial))
    texts = [f"{name} (violated by {count})" for name, count in counts.items()]
    return f"no trial is both complete and feasible: {', '.join(texts)}"
