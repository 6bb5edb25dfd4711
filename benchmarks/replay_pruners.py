"""Pruners on recorded curves: winners lost, steps saved, and regret at the same budget.

    python benchmarks/replay_pruners.py CURVES.csv [--slots 1,8] [--trials 8,32] [--studies 200]
    python benchmarks/replay_pruners.py                    synthetic curves
    python benchmarks/replay_pruners.py --write FILE.csv   write the synthetic curves, too

The format of CURVES.csv is that of `curves.py`. A replay draws configs at random without
replacement, and of each config one run; `replay.py` says how they report and are judged.
`replay_study.py` replays whole studies, with a sampler.

- winners lost: share of replays in which the run with the best result of all is pruned
- steps saved: share of all runs' steps that are not trained
- loss given away: distance of the best result of the trials that are complete to the best of all
- regret: the same, where the study draws trials until it has trained as many steps as the budget's
  number of whole runs. It is the distance to the best of all recorded runs, in units of the better
  half's width (the median result minus the best tenth's): a few learning rates that diverge would
  dominate a standard deviation.
- Δ: difference to the default pruner

After ± stands the standard error. The same replays (configs, runs, order) serve all pruners, so
differences are paired.
"""

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from curves import (
    Curve,
    by_config,
    keep_every,
    read_curves,
    spread,
    synthetic_curves,
    write_curves,
)
from optuna.pruners import BasePruner
from pruner_variants import DEFAULT, MakePruner, pruners
from replay import Replay, mean_and_error, numbers, replay


def main() -> None:
    """Replay the pruners, print a table for each number of trials, and one for budgets."""
    arguments = parse_arguments()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.curves is None:
        curves = synthetic_curves(
            arguments.configs, arguments.evaluations, arguments.noise, seed=0
        )
    else:
        curves = read_curves(arguments.curves, maximize=arguments.maximize)
    if arguments.write:
        write_curves(curves, arguments.write)
    curves = [keep_every(curve, arguments.every) for curve in curves]
    print(f"{len(curves)} runs, {len(by_config(curves))} configs")
    for slots in numbers(arguments.slots):
        for trials in numbers(arguments.trials):
            print_same_trials(curves, trials, slots, arguments)
        for budget in numbers(arguments.budgets):
            if budget >= slots:
                print_same_budget(curves, budget, slots, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="?", type=Path, help="CSV of recorded curves")
    parser.add_argument(
        "--maximize", action="store_true", help="larger values are better"
    )
    parser.add_argument("--slots", default="1,8")
    parser.add_argument("--trials", default="8,32", help="of a study")
    parser.add_argument("--budgets", default="8,16", help="in whole runs")
    parser.add_argument("--studies", type=int, default=200, help="replays")
    parser.add_argument(
        "--every", type=int, default=1, help="report each n-th evaluation alone"
    )
    parser.add_argument(
        "--warmup",
        type=float,
        default=0.05,
        help="share of a run's steps (optimizer.warmup_ratio of the recorded runs)",
    )
    parser.add_argument(
        "--first",
        default="1",
        help="first rungs that judge (min_resource), as multiples of the first evaluation's step",
    )
    parser.add_argument("--configs", type=int, default=200, help="synthetic ones")
    parser.add_argument("--evaluations", type=int, default=27, help="of synthetic runs")
    parser.add_argument(
        "--noise", type=float, default=0.02, help="of synthetic values, sd"
    )
    parser.add_argument("--write", type=Path, help="write the curves to a CSV")
    return parser.parse_args()


def draw_study(curves: Sequence[Curve], seed: int) -> list[Curve]:
    """One run of each config, in random order."""
    draw = random.Random(seed)
    runs = [draw.choice(runs) for runs in by_config(curves).values()]
    draw.shuffle(runs)
    return runs


def replay_curves(
    curves: Sequence[Curve],
    slots: int,
    pruner: BasePruner,
    warmup: float = 0.0,
    budget: float = math.inf,
) -> Replay:
    """Replay one study whose trials are given.

    Args:
        curves: the trials' runs, in the order in which they begin; the first is the baseline.
        slots: trials that train at once.
        pruner: the pruner, new for each replay.
        warmup: share of a run's steps before whose end no rung judges.
        budget: trained steps after which the study ends, with its running trials.
    """
    study = optuna.create_study(pruner=pruner)
    waiting = iter(curves)

    def begin_trial() -> tuple[Curve, optuna.Trial] | None:
        curve = next(waiting, None)
        return None if curve is None else (curve, study.ask())

    return replay(study, begin_trial, slots, warmup, budget)


def print_same_trials(
    curves: Sequence[Curve], trials: int, slots: int, arguments: argparse.Namespace
) -> None:
    """Print what each pruner loses and saves in studies of as many trials."""
    print(f"\n{trials} trials, {slots} slots, {arguments.studies} studies\n")
    print("| pruner | first rung | winners lost | loss given away | steps saved |")
    print("|---|---|---|---|---|")
    for first in numbers(arguments.first):
        for name, make in pruners(first).items():
            figures = compare_trials(
                curves, trials, slots, make, arguments.studies, arguments.warmup
            )
            # Of a share that is 0, too, an error: as if one more study had lost its winner.
            share = (figures.lost * arguments.studies + 1) / (arguments.studies + 2)
            error = math.sqrt(share * (1 - share) / arguments.studies)
            print(
                f"| {name} | {first} | {figures.lost:.1%} ± {error:.1%} | "
                f"{figures.given_away:.4f} | {figures.saved:.1%} |"
            )


@dataclass(frozen=True)
class TrialFigures:
    """Means over the replays of studies with the same trials."""

    lost: float
    given_away: float
    saved: float


def compare_trials(
    curves: Sequence[Curve],
    trials: int,
    slots: int,
    make: MakePruner,
    studies: int,
    warmup: float = 0.0,
) -> TrialFigures:
    """Replay studies of as many trials under a pruner."""
    lost, given_away, saved = [], [], []
    for seed in range(studies):
        drawn = draw_study(curves, seed)[:trials]
        outcome = replay_curves(drawn, slots, make(), warmup)
        best = min(curve.result for curve in drawn)
        best_complete = min(curve.result for curve in outcome.complete)
        lost.append(best_complete > best)
        given_away.append(best_complete - best)
        saved.append(1 - outcome.steps / sum(curve.total for curve in drawn))
    return TrialFigures(
        statistics.mean(lost), statistics.mean(given_away), statistics.mean(saved)
    )


def print_same_budget(
    curves: Sequence[Curve], budget: int, slots: int, arguments: argparse.Namespace
) -> None:
    """Print each pruner's regret where the budget is the same."""
    print(
        f"\nBudget: {budget} whole runs, {slots} slots, {arguments.studies} studies\n"
    )
    print("| pruner | first rung | regret | Δ | trials complete |")
    print("|---|---|---|---|---|")
    for first in numbers(arguments.first):
        candidates = pruners(first)
        figures = {
            name: compare_budget(
                curves, budget, slots, make, arguments.studies, arguments.warmup
            )
            for name, make in candidates.items()
        }
        default, _ = figures[DEFAULT]
        for name, (regrets, complete) in figures.items():
            differences = [a - b for a, b in zip(regrets, default, strict=True)]
            print(
                f"| {name} | {first} | {mean_and_error(regrets)} | "
                f"{mean_and_error(differences, '+')} | {statistics.mean(complete):.1f} |"
            )


def compare_budget(
    curves: Sequence[Curve],
    budget: int,
    slots: int,
    make: MakePruner,
    studies: int,
    warmup: float = 0.0,
) -> tuple[list[float], list[int]]:
    """Replay studies of the same budget under a pruner.

    Returns:
        Each replay's regret, and its number of complete trials.
    """
    results = [curve.result for curve in curves]
    unit = spread(results)
    steps = budget * max(curve.total for curve in curves)
    regrets, complete = [], []
    for seed in range(studies):
        outcome = replay_curves(draw_study(curves, seed), slots, make(), warmup, steps)
        best = min(curve.result for curve in outcome.complete)
        regrets.append((best - min(results)) / unit)
        complete.append(len(outcome.complete))
    return regrets, complete


if __name__ == "__main__":
    main()
