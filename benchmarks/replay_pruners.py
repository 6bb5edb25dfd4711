"""Pruners on recorded curves: winners lost, steps saved, and regret at the same budget.

    python benchmarks/replay_pruners.py CURVES.csv [--slots 1,8] [--trials 8,32] [--studies 200]
    python benchmarks/replay_pruners.py                    synthetic curves
    python benchmarks/replay_pruners.py --write FILE.csv   write the synthetic curves, too

The CSV has a header and one line for each evaluation after the first step, of runs that were not
pruned:

    trial   the config's name or number
    seed    the run's seed; a config may have several runs
    step    the optimizer step of the evaluation
    value   the objective

The runs may have different numbers of evaluations and of steps; the last line of a run is its
result. A run that diverged ends with a line whose value is nan.

A replay draws configs at random without replacement, and of each config one run. The first is the
baseline, which is never pruned. In K slots, the trials report to an Optuna study at their steps,
and the real pruner judges as in this project's studies: at each report, the trials that report at
the same step all report before one is judged, and each trial is judged again by its last rung
when others report. No trial is judged at a rung within the warm-up.

- winners lost: share of replays in which the run with the best result of all is pruned
- steps saved: share of all runs' steps that are not trained
- loss given away: distance of the best result of the trials that are complete to the best of all
- regret: the same, where the study draws trials until it has trained as many steps as the budget's
  number of whole runs. It is the distance to the best of all recorded runs, in
  standard deviations of the recorded results.

After ± stands the standard error. The same replays (configs, runs, order) serve all pruners.
"""

import argparse
import csv
import functools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from sweeps.space.pruners import WARMUP_RUNG, SuccessiveHalvingPruner

MakePruner = Callable[[], BasePruner]


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run that was not pruned."""

    trial: str
    seed: str
    steps: list[int]
    values: list[float]
    """The objective, as a cost: less is better."""

    @property
    def total(self) -> int:
        """The run's optimizer steps."""
        return self.steps[-1]

    @functools.cached_property
    def rungs(self) -> list[int]:
        """Each evaluation's index, as a study reports it: a multiple of the first one's step."""
        rungs: list[int] = []
        for step in self.steps:
            next_index = rungs[-1] + 1 if rungs else 1
            rungs.append(max(round(step / self.steps[0]), next_index))
        return rungs

    @property
    def result(self) -> float:
        """The run's last value; infinite where it diverged."""
        return math.inf if math.isnan(self.values[-1]) else self.values[-1]


@dataclass
class Live:
    """A trial in a slot."""

    curve: Curve
    trial: optuna.Trial
    begin: int
    """Steps that its slot had trained before."""
    reported: int = 0
    """Number of its evaluations that have been reported."""
    judged: bool = False
    """Whether it has reported a rung after its warm-up."""

    @property
    def next_report(self) -> int:
        return self.begin + self.curve.steps[self.reported]


@dataclass
class Replay:
    """What came of a study's replay."""

    complete: list[Curve] = field(default_factory=list)
    steps: int = 0
    """Trained by all trials."""


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


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def read_curves(path: Path, *, maximize: bool = False) -> list[Curve]:
    """Read recorded curves; a wrong file ends in one line that names the line and the column."""
    sign = -1 if maximize else 1
    points: dict[tuple[str, str], dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = {"trial", "seed", "step", "value"} - set(rows.fieldnames or [])
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(sorted(missing))}")
        for row in rows:
            location = f"{path}, line {rows.line_num}"
            try:
                step, value = int(row["step"]), sign * float(row["value"])
            except (TypeError, ValueError):
                raise SystemExit(
                    f"{location}: step={row['step']}, value={row['value']}: must be a whole "
                    "number and a number"
                ) from None
            # Before the first step all runs are alike, and none reports.
            if step <= 0:
                continue
            run = points.setdefault((row["trial"], row["seed"]), {})
            if step in run:
                raise SystemExit(f"{location}: step={step}: twice in one run")
            run[step] = value
    if not points:
        raise SystemExit(f"{path}: no curves")
    return [
        Curve(trial, seed, sorted(run), [run[step] for step in sorted(run)])
        for (trial, seed), run in points.items()
    ]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "seed", "step", "value"])
        for curve in curves:
            for step, value in zip(curve.steps, curve.values, strict=True):
                writer.writerow([curve.trial, curve.seed, step, repr(value)])


def synthetic_curves(
    configs: int, evaluations: int, noise: float, seed: int
) -> list[Curve]:
    """Return power laws that cross, with noise.

    A config is a learning rate: the best one lies in the middle of the range, and a higher one
    falls faster, so it leads early. The results without noise have a standard deviation of about 0.09.

    Args:
        configs: number of curves.
        evaluations: values of each curve.
        noise: standard deviation of each value's noise.
        seed: of the configs and of the noise.
    """
    draw = random.Random(seed)
    curves = []
    for config in range(configs):
        rate = draw.uniform(-1, 1)
        end = 2 + 0.3 * rate**2 + draw.gauss(0, 0.01)
        exponent = 0.7 + 0.3 * rate + draw.gauss(0, 0.05)
        steps, values = [], []
        for evaluation in range(1, evaluations + 1):
            share = evaluation / evaluations
            # Before the end, by how much the power law has still to fall.
            trend = end + 0.1 * (share**-exponent - 1)
            steps.append(10 * evaluation)
            values.append(trend + draw.gauss(0, noise))
        curves.append(Curve(str(config), "0", steps, values))
    return curves


def keep_every(curve: Curve, every: int) -> Curve:
    """Keep each n-th evaluation, counted so that the last one stays."""
    first = (len(curve.steps) - 1) % every
    return Curve(
        curve.trial, curve.seed, curve.steps[first::every], curve.values[first::every]
    )


def by_config(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    configs: dict[str, list[Curve]] = {}
    for curve in curves:
        configs.setdefault(curve.trial, []).append(curve)
    return configs


def draw_study(curves: Sequence[Curve], seed: int) -> list[Curve]:
    """One run of each config, in random order."""
    draw = random.Random(seed)
    runs = [draw.choice(runs) for runs in by_config(curves).values()]
    draw.shuffle(runs)
    return runs


def pruners(first: int) -> dict[str, MakePruner]:
    """Return the pruners to compare, by name.

    Args:
        first: the first rung that judges.
    """

    def halving(factor: int, survivors: int, margin: float) -> MakePruner:
        return lambda: SuccessiveHalvingPruner(
            min_resource=first,
            reduction_factor=factor,
            min_survivors=survivors,
            noise_margin=margin,
        )

    return {
        "none": optuna.pruners.NopPruner,
        "halving by 3": halving(3, 1, 0),
        "halving by 3, noise": halving(3, 1, 1),
        "halving by 3, three kept": halving(3, 3, 0),
        "halving by 3, noise, three kept": halving(3, 3, 1),
        "halving by 2": halving(2, 1, 0),
        "halving by 2, noise, three kept": halving(2, 3, 1),
        "Optuna's halving by 3": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first, reduction_factor=3
        ),
        "median": lambda: optuna.pruners.MedianPruner(
            n_startup_trials=4, n_warmup_steps=first - 1
        ),
        "best quarter": lambda: optuna.pruners.PercentilePruner(
            25.0, n_startup_trials=4, n_warmup_steps=first - 1
        ),
    }


def replay(
    curves: Sequence[Curve],
    slots: int,
    pruner: BasePruner,
    warmup: float = 0.0,
    budget: float = math.inf,
) -> Replay:
    """Replay one study.

    Args:
        curves: the trials' runs, in the order in which they begin; the first is the baseline.
        slots: trials that train at once.
        pruner: the pruner, new for each replay.
        warmup: share of a run's steps before whose end no rung judges.
        budget: trained steps after which the study ends, with its running trials.
    """
    study = optuna.create_study(pruner=pruner)
    outcome = Replay()
    waiting = list(reversed(curves))
    live: list[Live] = []
    clock = 0
    finished_steps = 0
    while True:
        while waiting and len(live) < slots:
            live.append(Live(waiting.pop(), study.ask(), clock))
        if not live:
            break
        clock = min(run.next_report for run in live)
        reporting = [run for run in live if run.next_report == clock]
        outcome.steps = finished_steps + sum(clock - run.begin for run in live)
        if outcome.steps > budget:
            break
        for run in reporting:
            report(run, warmup)
        for run in list(live):
            if run.reported == len(run.curve.steps):
                outcome.complete.append(run.curve)
                if math.isnan(run.curve.values[-1]):
                    study.tell(run.trial, state=TrialState.FAIL)
                else:
                    study.tell(run.trial, run.curve.values[-1])
            # Asked for the baseline, too: Optuna's pruner notes whom it has judged.
            elif run.judged and run.trial.should_prune() and run.trial.number > 0:
                study.tell(run.trial, state=TrialState.PRUNED)
            else:
                continue
            finished_steps += clock - run.begin
            live.remove(run)
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
        outcome = replay(drawn, slots, make(), warmup)
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
    print("| pruner | first rung | regret, sd | trials complete |")
    print("|---|---|---|---|")
    for first in numbers(arguments.first):
        for name, make in pruners(first).items():
            regrets, complete = compare_budget(
                curves, budget, slots, make, arguments.studies, arguments.warmup
            )
            error = statistics.stdev(regrets) / math.sqrt(len(regrets))
            print(
                f"| {name} | {first} | {statistics.mean(regrets):.2f} ± {error:.2f} | "
                f"{statistics.mean(complete):.1f} |"
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
        Each replay's regret in standard deviations, and its number of complete trials.
    """
    results = [curve.result for curve in curves]
    unit = statistics.stdev(result for result in results if math.isfinite(result))
    steps = budget * max(curve.total for curve in curves)
    regrets, complete = [], []
    for seed in range(studies):
        outcome = replay(draw_study(curves, seed), slots, make(), warmup, steps)
        best = min(curve.result for curve in outcome.complete)
        regrets.append((best - min(results)) / unit)
        complete.append(len(outcome.complete))
    return regrets, complete


if __name__ == "__main__":
    main()
