"""The time of a study on a GPU: this project against the stock stack, on a Llama of Llama-2-7B's
shapes.

    python benchmarks/gpu_study.py [--trials 32] [--steps 432] [--rungs 0.037,0.111,0.333]
    [--stock-trials 2] [--tiny]
                                   [--sides tutorial,best,ours,recipe] [--memory GIB]

The base has random weights, the rows are the standard library's source, a token a word or sign
(128 to 512 of them, mean about 350): real text, so that trials differ and are pruned as elsewhere.
A trial is LoRA on queries and values, batch 4. This project evaluates 32 held-out rows before it,
after the rungs' shares of its steps and at its end; halving by 3 judges at rungs each three times
as far as the one before. Its time is the wall time of the whole command, with its defaults; what
is imported has been read from the disk before.

The stock stack is hydra-optuna-sweeper with a plain TRL script for each trial (stock_trial.py):
`tutorial` has gradient checkpointing and the paged optimizer, `best` neither that nor padding, and
Liger's kernels (see gpu.py). It evaluates once, at the end, as it has no use for more. Every trial
loads the base anew. Its time is that of so many trials, from the base's loading on: the first, and
what the later ones take on average for each of the rest.

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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from llama import GPU, write_checkpoint
from study import read_lines, timed, write_lines

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


def main() -> None:
    """Run the sides, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--steps", type=int, default=432, help="of a whole trial")
    parser.add_argument(
        "--rungs",
        default="0.037,0.111,0.333",
        help="of this project's trials: shares of the steps",
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
            elsewhere.submit(write_checkpoint, folder / "base", arguments.tiny).result()
        for part, rows in texts(
            {"train": 256, "eval": 32}, 16 if arguments.tiny else 1
        ).items():
            write_lines(folder / f"{part}.jsonl", rows)
        timed(folder, [sys.executable, "-c", IMPORTS])
        os.sync()  # or who asks for a line to be on the disk waits for the base's gigabytes
        seconds, steps = {}, arguments.steps
        for side in arguments.sides.split(","):
            if side == "recipe":
                print(f"recipe: {recipe(folder)}", flush=True)
                continue
            if side == "ours":
                memory = arguments.memory if GPU else None
                seconds[side] = ours(
                    folder, arguments.trials, steps, arguments.rungs, memory
                )
            else:
                first, *others = stock(folder, side, arguments.stock_trials, steps)
                seconds[side] = first + (arguments.trials - 1) * statistics.fmean(
                    others or [first]
                )
            print(f"{side}: {seconds[side]:.0f} s", flush=True)
    study = f"{arguments.trials} trials of {steps} steps, ours judged after {arguments.rungs}"
    print(f"\n| {study} | seconds | this project is faster by |")
    print("|---|---|---|")
    for side, took in seconds.items():
        faster = (
            f"{took / seconds['ours']:.1f} times"
            if "ours" in seconds and side != "ours"
            else ""
        )
        print(f"| {side} | {took:.0f} | {faster} |")


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


def stock(folder: Path, side: str, trials: int, steps: int) -> list[float]:
    """Seconds of each of some trials of the stock stack."""
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
            f"hydra.sweeper.n_trials={trials}",
            "hydra.sweeper.n_jobs=1",
            "hydra.sweeper.sampler.seed=0",
        ],
        [
            "lora.targets=[q_proj,v_proj]",
            "rows.tokens=null",
            "++arguments.completion_only_loss=false",
            *STOCK[side],
        ],
        [f"hydra.sweep.dir={side}", f"++arguments.eval_steps={steps}"],
    )
    return [record["seconds"] for record in read_lines(records)]


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
    folder: Path, trials: int, steps: int, rungs: str, memory: float | None
) -> float:
    """Seconds of this project's whole study."""
    took = timed(
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
            f"trainer.eval_steps=[{rungs}]",
            "trainer.save_steps=0",
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
    states = [result["status"] for result in results]
    slots = {result["slots"] for result in results}
    tokens = sum(result["train_tokens"] for result in results)
    print(f"ours: {states.count('completed')} complete, {states.count('pruned')} pruned, {len(states)} in all, "
          f"slots {slots}, {tokens} tokens", flush=True)  # fmt: skip
    return took


if __name__ == "__main__":
    main()
