"""Whole studies on recorded curves: regret of samplers, pruners and rungs at the same budget.

    python benchmarks/replay_study.py CURVES.csv … [--vary pruner,rungs,start,sampler] [--slots 1,8]
        [--budgets 4,8,16,32] [--studies 100] [--base trainer.eval_steps=0.25]
    python benchmarks/replay_study.py CURVES.csv … --vary none --trials 4,8,16,32

A model of the curves that `record_curves.py` made (`curve_model.py`) gives any point of the default
space a learning curve. On it run studies with the project's config, samplers and pruners; only
training is replayed. The first trial is the baseline, as in real studies.

- Regret: the distance of the winner's config to the best one of the space, both without a seed's
  luck, in units of the better half's width (the median of random points minus their best tenth). The
  winner is the complete trial with the best measured result.
- A budget is counted in whole runs of the default config. An evaluation costs `--evaluation` of a
  run's training: 0.044 where a tenth of the rows is held out, three quarters are trained on, and a
  forward pass takes a third of a step; 0 counts tokens alone. A trial that is not complete when
  the budget is spent does not count.

After ± stands the standard error. Differences to the default study are paired: the same seeds, and
the same luck of each trial. The means are over all files.
"""

import argparse
import concurrent.futures
import functools
import math
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from curve_model import CurveModel
from curves import Curve
from replay import ROUNDING, mean_and_error, numbers, replay
from study_variants import DEFAULT, VARIANTS, StudyConfig, compose_study

from sweeps.space.distributions import suggest
from sweeps.space.samplers import make_pruner, make_sampler

WHOLE_RUN_EVALUATIONS = 4
"""Evaluations of a default run, one outside a study, after its first step."""


@dataclass(frozen=True)
class Task:
    """One study to replay."""

    path: Path
    overrides: tuple[str, ...]
    slots: int
    seed: int
    evaluation: float
    """Duration of an evaluation, as a share of a run's training."""
    budget: float = math.inf
    """In whole runs of the default config."""
    trials: float = math.inf


@dataclass(frozen=True)
class History:
    """The winner's regret as a study goes on."""

    spent: list[float]
    """Whole runs, up to when each complete trial ended."""
    regrets: list[float]
    """The winner's regret from then on."""
    total: float
    """Whole runs of all trials."""

    def regret_at(self, budget: float) -> float:
        """Return the regret when a budget is spent; nan before any trial is complete."""
        count = sum(spent <= budget + ROUNDING for spent in self.spent)
        return self.regrets[count - 1] if count else math.nan


def main() -> None:
    """Replay the default study and its variants, and print a table for each number of slots."""
    arguments = parse_arguments()
    for path in arguments.curves:
        print(load_model(path).description)
    variants: dict[str, list[str]] = {DEFAULT: arguments.base}
    for group in arguments.vary.split(","):
        for name, overrides in VARIANTS.get(group, {}).items():
            variants[name] = [*arguments.base, *overrides]
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        for slots in numbers(arguments.slots):
            if arguments.trials:
                print_trials(pool, variants, slots, arguments)
            else:
                print_budgets(pool, variants, slots, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="+", type=Path, help="CSV of recorded curves")
    parser.add_argument(
        "--vary", default="pruner,rungs,start,sampler", help="groups of variants; none"
    )
    parser.add_argument(
        "--base",
        nargs="*",
        default=[],
        metavar="OVERRIDE",
        help="of the study that variants are compared with, instead of the default study",
    )
    parser.add_argument("--slots", default="1,8")
    parser.add_argument("--budgets", default="4,8,16,32", help="in whole runs")
    parser.add_argument("--trials", default="", help="of a study, instead of budgets")
    parser.add_argument("--studies", type=int, default=100, help="for each file")
    parser.add_argument("--evaluation", type=float, default=0.044)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args()


@functools.cache
def load_model(path: Path) -> CurveModel:
    return CurveModel(path)


@functools.cache
def load_study(path: Path, overrides: tuple[str, ...]) -> StudyConfig:
    return compose_study(overrides, load_model(path).learning_rate)


def replay_task(task: Task) -> History:
    """Replay one study on the model of a file."""
    # Optuna's multivariate TPE and others are experimental to it.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model = load_model(task.path)
    config = load_study(task.path, task.overrides)
    total = model.steps[-1]
    evaluation_steps = task.evaluation * total
    whole_run = total + WHOLE_RUN_EVALUATIONS * evaluation_steps
    steps = config.rung_steps(total)
    study = optuna.create_study(pruner=make_pruner(config.settings))
    study.enqueue_trial(config.baseline)
    results: dict[str, float] = {}

    def begin_trial() -> tuple[Curve, optuna.Trial] | None:
        number = len(results)
        if number >= task.trials:
            return None
        study.sampler = make_sampler(config.settings, task.seed, number)
        trial = study.ask()
        for name, distribution in config.space.distributions.items():
            suggest(trial, name, distribution)
        expected = model.curves_at(model.encode(trial.params)[None])[0]
        results[str(number)] = float(expected[-1])
        # The same luck for the trial of that number in every variant.
        luck = np.random.default_rng([task.seed, number]).choice(model.deviations)
        values = np.interp(steps, model.steps, expected + luck)
        return Curve(str(number), "0", steps, values.tolist()), trial

    outcome = replay(
        study,
        begin_trial,
        task.slots,
        config.warmup,
        task.budget * whole_run,
        evaluation_steps,
    )
    regrets = []
    best = math.inf
    regret = math.nan
    for curve in outcome.complete:
        if curve.result < best:
            best = curve.result
            regret = (results[curve.trial] - model.best) / model.unit
        regrets.append(regret)
    spent = [steps / whole_run for steps in outcome.spent]
    return History(spent, regrets, outcome.steps / whole_run)


def replay_all(
    pool: concurrent.futures.Executor, arguments: argparse.Namespace, **task: Any
) -> list[History]:
    """Replay a variant's studies on all files."""
    tasks = [
        Task(path=path, seed=seed, evaluation=arguments.evaluation, **task)
        for path in arguments.curves
        for seed in range(arguments.studies)
    ]
    return list(pool.map(replay_task, tasks, chunksize=10))


def print_budgets(
    pool: concurrent.futures.Executor,
    variants: dict[str, list[str]],
    slots: int,
    arguments: argparse.Namespace,
) -> None:
    """Print each variant's regret at the same budgets, and its difference to the default."""
    budgets = [budget for budget in numbers(arguments.budgets) if budget >= slots]
    print(f"\nRegret, {slots} slots, {arguments.studies} studies on each file\n")
    titles = [f"{budget} runs | Δ" for budget in budgets]
    print(f"| study | {' | '.join(titles)} |")
    print(f"|---|{'---|---|' * len(budgets)}")
    default: list[History] = []
    for name, overrides in variants.items():
        histories = replay_all(
            pool,
            arguments,
            overrides=tuple(overrides),
            slots=slots,
            budget=max(budgets),
        )
        default = default or histories
        cells = []
        for budget in budgets:
            regrets = [history.regret_at(budget) for history in histories]
            pairs = zip(histories, default, strict=True)
            differences = [
                one.regret_at(budget) - other.regret_at(budget) for one, other in pairs
            ]
            cells += [mean_and_error(regrets), mean_and_error(differences, "+")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_trials(
    pool: concurrent.futures.Executor,
    variants: dict[str, list[str]],
    slots: int,
    arguments: argparse.Namespace,
) -> None:
    """Print each variant's regret after numbers of trials, and what they cost."""
    print(f"\n{slots} slots, {arguments.studies} studies on each file\n")
    print("| study | trials | regret | whole runs spent |\n|---|---|---|---|")
    for name, overrides in variants.items():
        for trials in numbers(arguments.trials):
            histories = replay_all(
                pool, arguments, overrides=tuple(overrides), slots=slots, trials=trials
            )
            regret = mean_and_error([history.regrets[-1] for history in histories])
            spent = statistics.mean(history.total for history in histories)
            print(f"| {name} | {trials} | {regret} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
