"""The time of a study on a GPU: this project against the stock stack, on a Llama of Llama-2-7B's
shapes.

    python benchmarks/gpu_study.py [--trials 32] [--steps 432] [--rungs SHARE,SHARE]
        [--stock-trials 2] [--sides tutorial,best,ours,recipe] [--memory GIB] [--tiny]

The base has random weights, the rows are the standard library's source, a token a word or sign
(128 to 512 of them, mean about 350): real text, so that trials differ and are pruned as elsewhere.
A trial is LoRA on queries and values, batch 4. This project evaluates 32 held-out rows before it,
at its default rungs or at those of `--rungs`, and at its end. Its time is the wall time of the
whole command, with its defaults; what is imported has been read from the disk before.

The stock stack is hydra-optuna-sweeper with a plain TRL script for each trial (stock_trial.py):
`tutorial` has gradient checkpointing and the paged optimizer, `best` neither that nor padding, and
Liger's kernels (see gpu.py). It evaluates once, at the end, as it has no use for more. Every trial
loads the base anew. Its time is that of so many trials, from the base's loading on: the first, and
what the later ones take on average for each of the rest.

Where a stock side has trained all its trials (`--stock-trials` as many as `--trials`), a second
table has the time until a complete trial first reached the same held-out loss: the worse of the
two sides' best losses. Both are means over all held-out tokens, TRL's in one batch of all rows.

The side `recipe` is no study: it trains the published recipe, `experiment=llama2_guanaco`, for 50
steps on that base. With `--memory` this project's study takes no more than so many GiB. `--tiny`
is a dry run.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from optuna.trial import TrialState
from random_base import GPU, write_checkpoint
from study import read_lines, timed, write_lines

from sweeps.study.study import Study

SPACE = [
    "lora.r=choice(8,16,32,64)",
    "lora.alpha=choice(8,16,32,64)",
    "lora.dropout=interval(0.0,0.15)",
    "optimizer.learning_rate=tag(log,interval(1e-5,1e-3))",
]
STOCK = {
    "tutorial": [
        "++arguments.gradient_checkpointing=true",
        "++arguments.optim=paged_adamw_32bit",
    ],
    "best": [
        "++arguments.padding_free=true",
        "++arguments.max_length=null",
        f"++arguments.use_liger_kernel={str(GPU).lower()}",
        "++arguments.optim=adamw_torch_fused",
        f"within_bounds={str(GPU).lower()}",
    ],
}
IMPORTS = """
import bitsandbytes, plotly.graph_objects
import finetune.run.run, finetune.engine.packed.bank, sweeps.answer.report, sweeps.sweeper
from transformers import LlamaForCausalLM
from trl import SFTTrainer
"""
"""A new machine reads these for most of a minute, on whichever side is first."""

CAPPED = """
import sys
import finetune.model.device, torch
from finetune.__main__ import main
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv.pop(1)) * 2**30 / total))
main()
"""
"""The command, in so many GiB."""


@dataclass(frozen=True)
class Outcome:
    """What came of one side's study."""

    seconds: float
    """Time of all its trials; estimated where only some were trained."""
    trials: list[tuple[float, float]]
    """Of each complete trial: seconds from the study's start to its end, and held-out loss."""

    @property
    def best(self) -> float:
        """The lowest held-out loss."""
        return min(loss for _, loss in self.trials)

    def seconds_to(self, loss: float) -> float:
        """Return the seconds until a complete trial had at most this loss."""
        return min(end for end, value in self.trials if value <= loss)


def main() -> None:
    """Run the sides, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--steps", type=int, default=432, help="of a whole trial")
    parser.add_argument(
        "--rungs",
        help="of this project's trials: shares of the steps; default: its own default",
    )
    parser.add_argument("--stock-trials", type=int, default=2, help="that are measured")
    parser.add_argument("--sides", default="tutorial,best,ours")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="that this project's study may take"
    )
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ProcessPoolExecutor(
            1, get_context("spawn")
        ) as elsewhere:  # this process keeps no GPU's memory
            elsewhere.submit(
                write_checkpoint,
                folder / "base",
                "tiny" if arguments.tiny else "llama2_7b",
            ).result()
        for part, rows in texts(
            {"train": 256, "eval": 32}, 16 if arguments.tiny else 1
        ).items():
            write_lines(folder / f"{part}.jsonl", rows)
        timed(folder, [sys.executable, "-c", IMPORTS])
        os.sync()  # or who asks for a line to be on the disk waits for the base's gigabytes
        outcomes: dict[str, Outcome] = {}
        steps = arguments.steps
        for side in arguments.sides.split(","):
            if side == "recipe":
                print(f"recipe: {recipe(folder)}", flush=True)
                continue
            if side == "ours":
                memory = arguments.memory if GPU else None
                outcomes[side] = ours(
                    folder, arguments.trials, steps, arguments.rungs, memory
                )
            else:
                outcomes[side] = stock(
                    folder, side, arguments.stock_trials, arguments.trials, steps
                )
            print(f"{side}: {outcomes[side].seconds:.0f} s", flush=True)
    print_times(arguments.trials, steps, arguments.rungs, outcomes)
    print_times_to_loss(arguments.trials, outcomes)


def print_times(
    trials: int, steps: int, rungs: str | None, outcomes: dict[str, Outcome]
) -> None:
    """Print each side's time for all trials."""
    judged = f"ours judged after {rungs or 'its default rungs'}"
    print(
        f"\n| {trials} trials of {steps} steps, {judged} | seconds | this project is faster by |"
    )
    print("|---|---|---|")
    for side, outcome in outcomes.items():
        faster = ""
        if "ours" in outcomes and side != "ours":
            faster = f"{outcome.seconds / outcomes['ours'].seconds:.1f} times"
        print(f"| {side} | {outcome.seconds:.0f} | {faster} |")


def print_times_to_loss(trials: int, outcomes: dict[str, Outcome]) -> None:
    """Print the time until each side reached a loss, beside this project's time."""
    mine = outcomes.get("ours")
    if mine is None:
        return
    print(
        "\n| | best loss | of this project | loss | seconds to it | of this project | faster by |"
    )
    print("|---|---|---|---|---|---|---|")
    for side, outcome in outcomes.items():
        if side != "ours" and len(outcome.trials) == trials:
            loss = max(outcome.best, mine.best)
            theirs, seconds = outcome.seconds_to(loss), mine.seconds_to(loss)
            print(
                f"| {side} | {outcome.best:.4f} | {mine.best:.4f} | {loss:.4f} | {theirs:.0f} | "
                f"{seconds:.0f} | {theirs / seconds:.1f} times |"
            )


def texts(counts: dict[str, int], divisor: int) -> dict[str, list[dict[str, str]]]:
    """So many rows for each part of the data, one after the other from the standard library's
    source."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    source = [
        token
        for file in files
        for token in re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf-8"))
    ]
    ids = {
        token: number
        for number, (token, _) in enumerate(Counter(source).most_common(31997), start=3)
    }
    draw, left = random.Random(0), iter(f"w{ids.get(token, 0)}" for token in source)
    sizes = (
        min(512, max(128, round(draw.gauss(350, 110)))) // divisor
        for _ in itertools.count()
    )
    return {
        part: [
            {"text": " ".join(itertools.islice(left, next(sizes)))} for _ in range(n)
        ]
        for part, n in counts.items()
    }


def stock(folder: Path, side: str, measured: int, trials: int, steps: int) -> Outcome:
    """Run some trials of the stock stack."""
    script = Path(__file__).resolve().with_name("stock_trial.py")
    records = folder / f"{side}.jsonl"
    timed(
        folder,
        [
            sys.executable,
            str(script),
            "-m",
            "hydra/sweeper=optuna",
            *SPACE,
            f"steps={steps}",
            f"records={records}",
        ],
        [
            f"hydra.sweeper.n_trials={measured}",
            "hydra.sweeper.n_jobs=1",
            "hydra.sweeper.sampler.seed=0",
        ],
        [
            "lora.targets=[q_proj,v_proj]",
            "rows.tokens=null",
            "++arguments.completion_only_loss=false",
            "++arguments.per_device_eval_batch_size=32",
            *STOCK[side],
        ],
        [f"hydra.sweep.dir={side}", f"++arguments.eval_steps={steps}"],
    )
    entries = read_lines(records)
    seconds = [entry["seconds"] for entry in entries]
    losses = [entry["trl_eval_loss"] for entry in entries]
    later = statistics.fmean(seconds[1:] or seconds)
    ends = itertools.accumulate(seconds)
    return Outcome(
        seconds=seconds[0] + (trials - 1) * later,
        trials=list(zip(ends, losses, strict=True)),
    )


def recipe(folder: Path) -> str:
    """What came of the published recipe."""
    timed(
        folder,
        [
            sys.executable,
            "-m",
            "finetune",
            "experiment=llama2_guanaco",
            "model.name_or_path=base",
            "tracker=none",
        ],
        ["dataset.path=train.jsonl", "trainer.max_steps=50", "hydra.run.dir=recipe"],
    )
    result = json.loads((folder / "recipe" / "result.json").read_text(encoding="utf-8"))
    speed, memory = result["tokens_per_second"], result["peak_memory_bytes"] / 2**30
    return f"{result['status']} by {result['engine']}, {speed:.0f} tokens/s, {memory:.1f} GiB"


def ours(
    folder: Path, trials: int, steps: int, rungs: str | None, memory: float | None
) -> Outcome:
    """Run this project's whole study."""
    judged = [] if rungs is None else [f"trainer.eval_steps=[{rungs}]"]
    began = time.time()
    seconds = timed(
        folder,
        [
            sys.executable,
            *(["-m", "finetune"] if memory is None else ["-c", CAPPED, str(memory)]),
        ],
        ["-m", "hydra/sweeper=optuna", "~search", *SPACE, "lora/target=q_v"],
        [
            "model.name_or_path=base",
            "dataset.path=train.jsonl",
            "dataset.eval_path=eval.jsonl",
        ],
        [
            "dataset.test_fraction=0",
            "sample_prompts=[]",
            "dataset.max_length=null",
            "tracker=none",
        ],
        [
            f"trainer.max_steps={steps}",
            "trainer.save_steps=0",
            *judged,
        ],
        [
            f"hydra.sweeper.n_trials={trials}",
            "hydra.sweeper.sampler.seed=0",
            "hydra.sweeper.study_name=ours",
        ],
        ["hydra.sweep.dir=ours"],
    )
    results = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in folder.glob("ours/trials/*/result.json")
    ]
    states = Counter(result["status"] for result in results)
    slots = {result["slots"] for result in results}
    tokens = sum(result["train_tokens"] for result in results)
    print(
        f"ours: {dict(states)}, slots {slots}, {tokens} trained tokens",
        flush=True,
    )
    complete = Study.load(folder / "ours").trials(TrialState.COMPLETE)
    ends: list[tuple[float, float]] = []
    for trial in complete:
        assert trial.datetime_complete is not None
        assert trial.value is not None
        ends.append((trial.datetime_complete.timestamp() - began, trial.value))
    return Outcome(seconds, ends)


if __name__ == "__main__":
    main()
