"""How many trials a warm start saves, on recorded curves: `python benchmarks/warm_start.py CSV CSV`.

On each file's model a first study of 20 trials runs. A second study on the same model, with other
luck, then begins cold, with the first one's results, or with the best points of a study on the
other file's model (another base or other rows). The regret is that of the best trial so far.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import optuna
from curve_model import CurveModel
from optuna.trial import FrozenTrial
from replay import mean_and_error
from study_variants import StudyConfig, compose_study

from sweeps.space.distributions import suggest
from sweeps.space.samplers import make_sampler
from sweeps.space.space import Point
from sweeps.study.earlier_results import WarmStartSampler
from sweeps.study.earlier_study import BEST_POINTS

FIRST_TRIALS = 20

Start = tuple[list[Point], list[FrozenTrial]]
"""Points to train, and results that the sampler has seen."""

SHOWN = (1, 2, 4, 6, 8, 12, 16, 20)
"""Numbers of trials after which the regret is printed."""


def search(
    model: CurveModel,
    config: StudyConfig,
    seed: int,
    points: list[Point],
    earlier: list[FrozenTrial],
) -> tuple[list[FrozenTrial], list[float]]:
    """Run a study without pruning.

    Args:
        model: gives each point its result.
        config: the study's space, sampler and baseline.
        seed: of sampler and luck.
        points: trained after the baseline.
        earlier: results that the sampler has seen.

    Returns:
        The trials, and the regret of the best one so far after each of them.
    """
    study = optuna.create_study()
    for point in (config.baseline, *points):
        study.enqueue_trial(point, skip_if_exists=True)
    generator = np.random.default_rng(seed)
    expected = []
    regrets = []
    for number in range(FIRST_TRIALS):
        sampler = make_sampler(config.settings, seed, number)
        study.sampler = WarmStartSampler(sampler, earlier) if earlier else sampler
        trial = study.ask()
        for name, distribution in config.space.distributions.items():
            suggest(trial, name, distribution)
        curve = model.curves_at(model.encode(trial.params)[None])[0]
        expected.append(float(curve[-1]))
        luck = generator.choice(model.deviations)
        study.tell(trial, float(curve[-1] + luck[-1]))
        winner = expected[study.best_trial.number]
        regrets.append((winner - model.best) / model.unit)
    return study.trials, regrets


def main() -> None:
    """Print a table of regrets by number of trials, for each file and each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs=2, type=Path, help="CSVs of recorded curves")
    parser.add_argument("--studies", type=int, default=100)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    models = [CurveModel(path) for path in arguments.curves]
    configs = [compose_study([], model.learning_rate) for model in models]
    histories: dict[tuple[int, str], list[list[float]]] = {}
    for seed in range(arguments.studies):
        firsts = [
            search(model, config, seed, [], [])[0]
            for model, config in zip(models, configs, strict=True)
        ]
        for index, (model, config) in enumerate(zip(models, configs, strict=True)):
            starts = make_starts(firsts[index], firsts[1 - index])
            for name, (points, earlier) in starts.items():
                _, regrets = search(model, config, 1000 + seed, points, earlier)
                histories.setdefault((index, name), []).append(regrets)
    print_table(arguments.curves, histories)


def make_starts(same: list[FrozenTrial], other: list[FrozenTrial]) -> dict[str, Start]:
    """Return the points and results with which a second study begins.

    Args:
        same: the trials of the first study on the same model.
        other: those of the first study on the other model.
    """
    # As `sweeps.study.warm_start.earlier_trials` makes them.
    for trial in same:
        trial.number = -1
    best = [trial.params for trial in sorted(same, key=value_of)]
    best_of_other = [trial.params for trial in sorted(other, key=value_of)]
    return {
        "cold": ([], []),
        "results": (best[:1], same),
        "points": (best_of_other[:BEST_POINTS], []),
    }


def print_table(
    paths: list[Path], histories: dict[tuple[int, str], list[list[float]]]
) -> None:
    """Print mean regrets, and after how many trials a start has the cold study's last regret."""
    columns = " | ".join(map(str, SHOWN))
    print(f"| curves | start | {columns} | trials |")
    print(f"|---|---|{'---|' * (len(SHOWN) + 1)}")
    for (index, name), regrets in histories.items():
        target = np.mean(histories[index, "cold"], axis=0)[-1]
        reached = np.flatnonzero(np.mean(regrets, axis=0) <= target)
        cells = []
        for count in SHOWN:
            cells.append(mean_and_error([history[count - 1] for history in regrets]))
        trials = str(reached[0] + 1) if len(reached) else f"over {FIRST_TRIALS}"
        print(f"| {paths[index].stem} | {name} | {' | '.join(cells)} | {trials} |")


def value_of(trial: FrozenTrial) -> float:
    """Return the value of a complete trial."""
    assert trial.value is not None
    return trial.value


if __name__ == "__main__":
    main()
