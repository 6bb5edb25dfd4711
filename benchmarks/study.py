"""One study by this project against the same study by the stock stack: wall time, best held-out
loss, trained tokens.

    python benchmarks/study.py [--trials 16] [--steps 8] [--oumi OUMI/bin/oumi]

The stock stack is hydra-optuna-sweeper as it is, with a plain TRL script (stock_trial.py) for each
trial. This project is `python -m finetune -m hydra/sweeper=optuna` with its default sampler,
pruner and baseline; the baseline is one of its trials. Both search the same space from the same
seed, and train SmolLM2-135M in NF4 on the same rows of `python_docs`: LoRA on all linear layers,
AdamW, cosine schedule, batch 4, the same number of optimizer steps, four evaluations of the same
held-out rows on the way. Neither saves checkpoints on the way nor tracks.

Both losses are the mean over all answers' tokens of the held-out rows. TRL's own is a mean of
batch means, so the stock trials' models are measured anew when each has ended; that time is
subtracted. The stock side's best is the best of these measures, whichever trial its sweeper would
choose.

With `--oumi`, the tuner of Oumi is a third side: oumi_study.py says how to install it, and in what
its study differs. Its adapters are measured in the same way, after its time has been taken. Its
base is float32, whose loss is lower than that of NF4 before anything is learnt; so this project
does its study a second time with that base, for comparison.

The sides run one after the other: nothing else should run on the machine. On two CPU cores the
stock side takes 12 to 25 minutes.
"""

import argparse
import json
import math
import os
import shutil
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
STOCK, OUMI, OURS, OURS_FLOAT32 = (
    "stock",
    "oumi tune, float32",
    "this project",
    "this project, float32",
)
SIDES = {"stock": STOCK, "oumi": OUMI, "ours": OURS, "ours_float32": OURS_FLOAT32}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        help="optimizer steps of a whole trial, a multiple of 4",
    )
    parser.add_argument(
        "--sides", help=f"of {', '.join(SIDES)}; default: stock,ours, all with --oumi"
    )
    parser.add_argument(
        "--oumi", metavar="FILE", help="Oumi's command, in an environment of its own"
    )
    parser.add_argument(
        "--oumi-evaluations",
        type=int,
        choices=range(1, EVALUATIONS + 1),
        default=EVALUATIONS,
        help="of a trial",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="a new folder for all outputs; default: none are kept",
    )
    arguments = parser.parse_args()
    trials, steps = arguments.trials, arguments.steps
    if trials < 1 or steps < EVALUATIONS or steps % EVALUATIONS:
        parser.error(
            f"--trials must be at least 1, --steps a multiple of {EVALUATIONS}"
        )
    if arguments.keep is not None and arguments.keep.exists():
        parser.error(f"--keep {arguments.keep}: exists already")
    sides = (
        arguments.sides or (",".join(SIDES) if arguments.oumi else "stock,ours")
    ).split(",")
    if not set(sides) <= set(SIDES):
        parser.error(f"--sides {arguments.sides}: must be of {', '.join(SIDES)}")
    oumi = os.path.abspath(shutil.which(arguments.oumi or "") or "")
    if "oumi" in sides and not os.path.isfile(oumi):
        parser.error(f"--oumi {arguments.oumi}: no such command")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.keep or Path(temporary)
        prepare(folder)
        run = {
            "stock": lambda: stock_study(folder, trials, steps),
            "oumi": lambda: oumi_study(
                folder, oumi, trials, steps, arguments.oumi_evaluations
            ),
            "ours": lambda: our_study(folder, trials, steps, "ours"),
            "ours_float32": lambda: our_study(
                folder,
                trials,
                steps,
                "ours_float32",
                "quantization=none",
                "model.dtype=float32",
            ),
        }
        print_table({SIDES[side]: run[side]() for side in sides})


def prepare(folder: Path) -> None:
    """What the sides read: the base, the training rows and the held-out rows, as chats and as
    tokens."""
    from hydra import compose, initialize_config_dir

    from finetune.config.paths import CONF
    from finetune.config.schema import RunConfig
    from finetune.console import quiet_libraries
    from finetune.run.resources import SharedResources

    quiet_libraries()
    with initialize_config_dir(str(CONF)):
        config = RunConfig.from_hydra(compose("config"))
    resources = SharedResources()
    rows = resources.rows(config.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base").symlink_to(resources.source(config.model).location)
    for part, messages in (("train", rows.train), ("eval", rows.evaluation)):
        chats = [row["messages"] for row in messages]
        write_lines(
            folder / f"{part}.jsonl",
            [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats],
        )
        write_lines(
            folder / f"{part}_tokens.jsonl",
            list(resources.tokens(part, messages, config)),
        )


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Rows from JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def stock_study(folder: Path, trials: int, steps: int) -> Outcome:
    """The stock sweeper with its default launcher and sampler, one trial at a time."""
    script = Path(__file__).resolve().with_name("stock_trial.py")
    seconds = timed(
        folder,
        [
            sys.executable,
            str(script),
            "-m",
            "hydra/sweeper=optuna",
            *SPACE,
            f"steps={steps}",
        ],
        [
            f"hydra.sweeper.n_trials={trials}",
            "hydra.sweeper.n_jobs=1",
            "hydra.sweeper.sampler.seed=0",
        ],
        ["hydra.sweep.dir=stock"],
    )
    records = read_lines(folder / "records.jsonl")
    losses = [
        record["eval/loss"]
        for record in records
        if math.isfinite(record["trl_eval_loss"])
    ]
    return Outcome(
        seconds=seconds - sum(record["measuring_seconds"] for record in records),
        losses=losses,
        tokens=int(sum(record["train_tokens"] for record in records)),
        pruned=0,
        failed=trials - len(losses),
    )


def oumi_study(
    folder: Path, oumi: str, trials: int, steps: int, evaluations: int
) -> Outcome:
    """Oumi's tuner; its adapters are measured afterwards."""
    from oumi_study import CONFIG, RECORDS, write_config

    write_config(folder, trials, steps, evaluations)
    seconds = timed(folder, [oumi, "tune", "-c", CONFIG])
    timed(
        folder,
        [sys.executable, str(Path(__file__).resolve().with_name("oumi_study.py"))],
    )
    records = read_lines(folder / RECORDS)
    return Outcome(
        seconds=seconds,
        losses=[record["eval/loss"] for record in records],
        tokens=int(sum(record["train_tokens"] for record in records)),
        pruned=0,
        failed=trials - len(records),
    )


def our_study(folder: Path, trials: int, steps: int, name: str, *extra: str) -> Outcome:
    """This project's sweeper with its defaults, but for extra overrides."""
    seconds = timed(
        folder,
        [
            sys.executable,
            "-m",
            "finetune",
            "-m",
            "hydra/sweeper=optuna",
            "~search",
            *SPACE,
        ],
        [
            "dataset.path=train.jsonl",
            "dataset.eval_path=eval.jsonl",
            "dataset.test_fraction=0",
            "sample_prompts=[]",
        ],
        [
            f"trainer.max_steps={steps}",
            f"trainer.eval_steps={steps // EVALUATIONS}",
            "trainer.save_steps=0",
        ],
        [
            f"hydra.sweeper.n_trials={trials}",
            "hydra.sweeper.sampler.seed=0",
            f"hydra.sweeper.study_name={name}",
        ],
        [f"hydra.sweep.dir={name}", "tracker=none", *extra],
    )
    results = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in folder.glob(f"{name}/trials/*/result.json")
    ]
    losses = [
        result["metrics"]["eval/loss"]
        for result in results
        if result["status"] == "completed"
    ]
    pruned = sum(result["status"] == "pruned" for result in results)
    return Outcome(
        seconds=seconds,
        losses=losses,
        tokens=sum(result["train_tokens"] for result in results),
        pruned=pruned,
        failed=trials - len(losses) - pruned,
    )


def timed(folder: Path, *arguments: list[str]) -> float:
    """Wall time of a command, in seconds; what it prints goes to stderr."""
    command = [word for words in arguments for word in words]
    # The stock side's first trial caches its tokenised rows in the folder, the others read them.
    # Nobody asks a hub.
    offline = {
        "HF_DATASETS_CACHE": str(folder.resolve() / "cache"),
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    environment = {**os.environ, **offline}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began


def print_table(outcomes: dict[str, Outcome]) -> None:
    """Each side's figures; for two on the same base the ratio of wall times and the difference of
    best losses."""
    print(
        "\n| | wall time, s | best held-out loss | trained tokens | complete | pruned | failed |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, side in outcomes.items():
        counts = f"{len(side.losses)} | {side.pruned} | {side.failed}"
        print(
            f"| {name} | {side.seconds:.0f} | {side.best:.4f} | {side.tokens} | {counts} |"
        )
    for mine, theirs in ((OURS, STOCK), (OURS_FLOAT32, OUMI)):
        if mine in outcomes and theirs in outcomes:
            ours, peer = outcomes[mine], outcomes[theirs]
            faster, share = peer.seconds / ours.seconds, ours.tokens / peer.tokens
            loss = f"{ours.best / peer.best - 1:+.2%}"
            print(
                f"| {mine} / {theirs} | {faster:.2f} times faster | {loss} | {share:.2f} | | | |"
            )


if __name__ == "__main__":
    main()
