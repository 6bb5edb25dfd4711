"""Learning curves of runs that were not pruned: read from a CSV, written, or synthetic.

The CSV has a header and one line for each evaluation after the first step:

    trial   the config's name or number
    seed    the run's seed; a config may have several runs
    step    the optimizer step of the evaluation
    value   the objective

Further columns are the config's searched parameters. The runs may have different numbers of
evaluations and of steps; the last line of a run is its result. A run that diverged ends with a line
whose value is nan.
"""

import csv
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("trial", "seed", "step", "value")


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run that was not pruned."""

    trial: str
    seed: str
    steps: list[int]
    values: list[float]
    """The objective, as a cost: less is better."""
    params: dict[str, str] = field(default_factory=dict)
    """The config's searched parameters, as the file has them."""

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


def read_curves(path: Path, *, maximize: bool = False) -> list[Curve]:
    """Read recorded curves; a wrong file ends in one line that names the line and the column."""
    sign = -1 if maximize else 1
    points: dict[tuple[str, str], dict[int, float]] = {}
    params: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = set(COLUMNS) - set(rows.fieldnames or [])
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
            name = row["trial"], row["seed"]
            run = points.setdefault(name, {})
            if step in run:
                raise SystemExit(f"{location}: step={step}: twice in one run")
            run[step] = value
            params[name] = {key: row[key] for key in row if key not in COLUMNS}
    if not points:
        raise SystemExit(f"{path}: no curves")
    return [
        Curve(*name, sorted(run), [run[step] for step in sorted(run)], params[name])
        for name, run in points.items()
    ]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
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
        curve.trial,
        curve.seed,
        curve.steps[first::every],
        curve.values[first::every],
        curve.params,
    )


def by_config(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    configs: dict[str, list[Curve]] = {}
    for curve in curves:
        configs.setdefault(curve.trial, []).append(curve)
    return configs


def spread(results: Sequence[float]) -> float:
    """Return the unit in which regret is measured: the median result minus the best tenth's.

    The standard deviation would be that of the few learning rates that diverge, and quartiles on
    both sides of the median contain them too. Differences among good configs are what a search is
    for, so the unit is the width of the better half, without its luckiest runs.
    """
    ranked = sorted(results)
    return ranked[len(ranked) // 2] - ranked[len(ranked) // 10]
