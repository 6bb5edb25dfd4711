"""How far the noise that the pruner estimates from a study's curves exceeds their true noise.

    python benchmarks/curve_noise.py CURVES.csv … [--studies 200]

The estimate (`sweeps.space.pruners.CurveNoise`) is the median absolute second difference of values
at neighbouring rungs; with few rungs it contains the bend of the curves. For 27, 9 and 4
evaluations a run, of studies of 8 random configs:

- estimate: the mean of the pruner's estimates
- without the common bend: the same, after each second difference has lost the median of all
  trials' at the same rungs
- independent noise: the same estimate from the deviations of runs from the mean of their config's
  seeds, which have no bend
- a seed's luck: the standard deviation of such deviations, the mean of all evaluations
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import optuna
from curve_model import seed_deviations
from curves import by_config, keep_every, read_curves
from optuna.trial import create_trial

from sweeps.space.pruners import MAD_TO_DEVIATION, CurveNoise

TRIALS = 8


def main() -> None:
    """Print a line for each file and number of evaluations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="+", type=Path, help="CSV of recorded curves")
    parser.add_argument("--studies", type=int, default=200)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(
        "| curves | evaluations | estimate | without the common bend | independent noise | "
        "a seed's luck |\n|---|---|---|---|---|---|"
    )
    for path in arguments.curves:
        curves = read_curves(path)
        deviations = seed_deviations(path, curves)
        first_runs = [runs[0] for runs in by_config(curves).values()]
        for every in (1, 3, 7):
            sparse_curves = [keep_every(curve, every) for curve in first_runs]
            values = np.array(
                [curve.values for curve in sparse_curves if curve.result < math.inf]
            )
            estimates, centered = [], []
            for seed in range(arguments.studies):
                rows = random.Random(seed).sample(range(len(values)), TRIALS)
                estimates.append(pruner_estimate(values[rows]))
                differences = np.diff(values[rows], 2, axis=1)
                bend = np.median(differences, axis=0)
                centered.append(deviation(differences - bend))
            first = (deviations.shape[1] - 1) % every
            luck = deviations[:, first::every]
            independent = deviation(np.diff(luck, 2, axis=1))
            figures = (np.mean(estimates), np.mean(centered), independent, luck.std())
            cells = " | ".join(f"{figure:.4f}" for figure in figures)
            print(f"| {path.stem} | {values.shape[1]} | {cells} |")


def pruner_estimate(curves: np.ndarray) -> float:
    """Return the pruner's estimate from the values of trials `[trials, evaluations]`."""
    trials = []
    for number, values in enumerate(curves):
        trial = create_trial(value=1.0, intermediate_values=dict(enumerate(values, 1)))
        trial.number = number
        trials.append(trial)
    return CurveNoise().deviation(trials)


def deviation(differences: np.ndarray) -> float:
    """Return the standard deviation of values whose second differences these are."""
    median = np.median(np.abs(differences))
    return float(median) * MAD_TO_DEVIATION / math.sqrt(6)


if __name__ == "__main__":
    main()
