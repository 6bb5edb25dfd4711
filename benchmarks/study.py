"""One study by this project against the same study by the stock stack: wall time, best held-out loss, trained tokens.

    python benchmarks/study.py [--trials 16] [--steps 8]

The stock stack is hydra-optuna-sweeper as it is, with a plain TRL script (stock_trial.py) for each trial. This
project is `python -m finetune -m hydra/sweeper=optuna` with its default sampler, pruner and baseline; the baseline
is one of its trials. Both search the same space from the same seed, and train SmolLM2-135M in NF4 on the same rows
of `python_docs`: LoRA on all linear layers, AdamW, cosine schedule, batch 4, the same number of optimizer steps, four
evaluations of the same held-out rows on the way. Neither saves checkpoints on the way nor tracks.

Both losses are the mean over all answers' tokens of the held-out rows. TRL's own is a mean of batch means, so the
stock trials' models are measured anew when each has ended; that time is subtracted. The stock side's best is the
best of these measures, whichever trial its sweeper would choose.

The sides run one after the other: nothing else should run on the machine. On two CPU cores the stock side takes 20
to 25 minutes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPACE = [
    "lora.r=choice(4,8,16,32,64)",
    "lora.alpha=choice(8,16,32,64)",
    "lora.dropout=interval(0.0,0.15)",
    "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))",
]
STOCK, OURS = "stock", "this project"
EVALUATIONS = 4


@dataclass(frozen=True)
class Outcome:
    """What came of one side's study."""

    seconds: float
    losses: list[float]
    """Held-out losses of the complete trials."""
    tokens: int
    """Trained, padding not counted."""
    pruned: int
    failed: int

    @property
    def best(self) -> float:
        """The lowest held-out loss; no number where no trial is complete."""
        return min(self.losses, default=math.nan)


def main() -> None:
    """Run the studies and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a whole trial, a multiple of 4")
    parser.add_argument("--side", choices=["stock", "ours", "both"], default="both")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for all outputs; default: none are kept")
    arguments = parser.parse_args()
    if arguments.trials < 1 or arguments.steps < EVALUATIONS or arguments.steps % EVALUATIONS:
        parser.error(f"--trials must be at least 1, --steps a multiple of {EVALUATIONS}")
    if arguments.keep is not None and arguments.keep.exists():
        parser.error(f"--keep {arguments.keep}: exists already")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.keep or Path(temporary)
        prepare(folder)
        outcomes = {}
        if arguments.side != "ours":
            outcomes[STOCK] = stock_study(folder, arguments.trials, arguments.steps)
        if arguments.side != "stock":
            outcomes[OURS] = our_study(folder, arguments.trials, arguments.steps)
    print_table(outcomes)


def prepare(folder: Path) -> None:
    """What both sides read: the base, the training rows and the held-out rows; the latter's tokens for the measure."""
    from hydra import compose, initialize_config_dir

    from finetune.cli import CONF, quiet_libraries
    from finetune.config import RunConfig
    from finetune.supplies import Supplies

    quiet_libraries()
    with initialize_config_dir(str(CONF)):
        config = RunConfig.from_hydra(compose("config"))
    supplies = Supplies()
    rows = supplies.rows(config.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base").symlink_to(supplies.source(config.model).location)
    for part, messages in (("train", rows.train), ("eval", rows.evaluation)):
        chats = [row["messages"] for row in messages]
        write_lines(folder / f"{part}.jsonl", [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    write_lines(folder / "eval_tokens.jsonl", supplies.tokens("eval", rows.evaluation, config).to_list())


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def stock_study(folder: Path, trials: int, steps: int) -> Outcome:
    """The stock sweeper with its default launcher and sampler, one trial at a time."""
    script = Path(__file__).resolve().with_name("stock_trial.py")
    seconds = timed(
        folder,
        [str(script), "-m", "hydra/sweeper=optuna", *SPACE, f"steps={steps}"],
        [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0"],
        ["hydra.sweep.dir=stock"],
    )
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["eval/loss"] for record in records if math.isfinite(record["trl_eval_loss"])]
    return Outcome(
        seconds=seconds - sum(record["measuring_seconds"] for record in records),
        losses=losses,
        tokens=int(sum(record["train_tokens"] for record in records)),
        pruned=0,
        failed=trials - len(losses),
    )


def our_study(folder: Path, trials: int, steps: int) -> Outcome:
    """This project's sweeper with its defaults."""
    seconds = timed(
        folder,
        ["-m", "finetune", "-m", "hydra/sweeper=optuna", "~search", *SPACE],
        ["dataset.path=train.jsonl", "dataset.eval_path=eval.jsonl", "dataset.test_fraction=0", "sample_prompts=[]"],
        [f"trainer.max_steps={steps}", f"trainer.eval_steps={steps // EVALUATIONS}", "trainer.save_steps=0"],
        [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.study_name=ours"],
        ["hydra.sweep.dir=ours", "tracker=none"],
    )
    results = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("ours/trials/*/result.json")]
    losses = [result["metrics"]["eval/loss"] for result in results if result["status"] == "completed"]
    pruned = sum(result["status"] == "pruned" for result in results)
    return Outcome(
        seconds=seconds,
        losses=losses,
        tokens=sum(result["train_tokens"] for result in results),
        pruned=pruned,
        failed=trials - len(losses) - pruned,
    )


def timed(folder: Path, *arguments: list[str]) -> float:
    """Wall time of a Python command, in seconds; what it prints goes to stderr."""
    command = [sys.executable, *(word for words in arguments for word in words)]
    # The stock side's first trial caches its tokenised rows in the folder, the others read them.
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder.resolve() / "cache")}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began


def print_table(outcomes: dict[str, Outcome]) -> None:
    """Each side's figures; the ratio of wall times and the relative difference of best losses."""
    print("\n| | wall time, s | best held-out loss | trained tokens | complete | pruned | failed |")
    print("|---|---|---|---|---|---|---|")
    for name, side in outcomes.items():
        counts = f"{len(side.losses)} | {side.pruned} | {side.failed}"
        print(f"| {name} | {side.seconds:.0f} | {side.best:.4f} | {side.tokens} | {counts} |")
    if len(outcomes) == 2:
        stock, ours = outcomes[STOCK], outcomes[OURS]
        faster, share = stock.seconds / ours.seconds, ours.tokens / stock.tokens
        loss = f"{ours.best / stock.best - 1:+.2%}"
        print(f"| {OURS} / {STOCK} | {faster:.2f} times faster | {loss} | {share:.2f} | | | |")


if __name__ == "__main__":
    main()
