"""Whole runs until a study first has a config as good as asked for, on recorded curves.

    python benchmarks/time_to_loss.py CURVES.csv … [--studies 15] [--trials 24]
        [--regrets 0.5,0.25,0.15]

Studies are replayed as `replay_study.py` does it. `one after the other` is what the stock sweeper
does: whole trials, one evaluation at their end, TPE with Optuna's ten random points. `in slots` is
this project's default study in 8 slots, whose runs are counted as they are spent: 8 slots that train
for a whole run spend 8. The time to a loss is these runs divided by the speed of either side, which
other benchmarks measure.

The table has medians over the studies of all files; inf where most studies did not get there.
"""

import argparse
import concurrent.futures
import math
import statistics
from pathlib import Path

from replay_study import History, replay_all

STUDIES = {
    "one after the other": (
        [
            "hydra/sweeper/pruner=none",
            "hydra.sweeper.sampler.n_startup_trials=10",
            "trainer.eval_steps=0",
        ],
        1,
    ),
    # The rungs of the published table.
    "in slots": (["trainer.eval_steps=0.25"], 8),
}
"""Overrides of the default study, and slots."""


def main() -> None:
    """Replay the studies, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="+", type=Path, help="CSV of recorded curves")
    parser.add_argument("--studies", type=int, default=15, help="for each file")
    parser.add_argument("--trials", type=int, default=24, help="of a study")
    parser.add_argument("--regrets", default="0.5,0.25,0.15")
    parser.add_argument("--evaluation", type=float, default=0.044)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    regrets = [float(regret) for regret in arguments.regrets.split(",")]
    titles = [f"regret {regret}" for regret in regrets]
    print(f"| study | {' | '.join(titles)} |\n|---|{'---|' * len(regrets)}")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        for name, (overrides, slots) in STUDIES.items():
            histories = replay_all(
                pool,
                arguments,
                overrides=tuple(overrides),
                slots=slots,
                trials=arguments.trials,
            )
            cells = []
            for regret in regrets:
                spent = [runs_to(history, regret) for history in histories]
                cells.append(f"{statistics.median(spent):.1f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def runs_to(history: History, regret: float) -> float:
    """Return the whole runs that a study spent until its winner's regret was at most this."""
    for spent, value in zip(history.spent, history.regrets, strict=True):
        if value <= regret:
            return spent
    return math.inf


if __name__ == "__main__":
    main()
