"""What `python -m finetune.plan` predicts, beside the peak memory of the run itself, on a CPU.

    python benchmarks/memory_plan.py [CASE …]

Each run is a process of its own; its peak is the resident memory that the system reports when it
ends. Takes one to three minutes for each case.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peak_memory import run_and_measure

GIB = 2**30
WORDS = (
    "time year people way day man thing woman life child world school state family "
    "group country problem hand place case week company system program question work"
).split()

COMMON = (
    "tracker=none",
    "sample_prompts=[]",
    # With this seed the largest batch of each case comes after the first step, when the optimizer
    # has its averages: as in a run of many steps.
    "seed=4",
    "trainer.max_steps=3",
    "trainer.eval_steps=3",
    "dataset.eval_fraction=0.2",
    "dataset.test_fraction=0",
)


@dataclass(frozen=True)
class Case:
    """A config: rows of so many words, and what it overrides."""

    words: tuple[int, int]
    """Least and most words of a row; each is about one token."""
    overrides: tuple[str, ...] = ()
    base: str = "smollm2_135m"
    """The packaged base, or one of `write_base`."""
    rows: int = 20
    slots: int = 1
    """More: a study of as many trials at once."""


SHORT = (100, 300)
EQUAL_1024 = (1100, 1100)
EQUAL_2048 = (2200, 2200)
CASES = {
    "default": Case(SHORT),
    "no quantization": Case(SHORT, ("quantization=none",)),
    "int8": Case(SHORT, ("quantization=int8",)),
    "nf4_double, r 128, dropout": Case(
        SHORT, ("quantization=nf4_double", "lora=r128", "lora.dropout=0.1")
    ),
    "DoRA": Case(SHORT, ("lora.use_dora=true",)),
    "DoRA (trl)": Case(SHORT, ("lora.use_dora=true", "trainer.engine=trl")),
    "rows of 2,048, batch 1": Case(
        EQUAL_2048,
        (
            "dataset.max_length=2048",
            "dataset.eval_fraction=0.1",
            "trainer.per_device_train_batch_size=1",
            "trainer.per_device_eval_batch_size=1",
        ),
    ),
    "short rows, batch 8, accumulation 2": Case(
        (20, 60),
        (
            "trainer.per_device_train_batch_size=8",
            "trainer.gradient_accumulation_steps=2",
        ),
    ),
    "rows of 1,024, checkpointing": Case(
        EQUAL_1024,
        (
            "trainer.gradient_checkpointing=true",
            "trainer.per_device_train_batch_size=2",
            "trainer.per_device_eval_batch_size=2",
        ),
    ),
    "rows of 1,024, no checkpointing": Case(
        EQUAL_1024,
        (
            "trainer.gradient_checkpointing=false",
            "trainer.per_device_train_batch_size=2",
            "trainer.per_device_eval_batch_size=2",
        ),
    ),
    "engine=trl": Case(SHORT, ("trainer.engine=trl",)),
    "Adafactor (trl)": Case(
        (20, 60), ("optimizer=adafactor", "lora=r128", "trainer.engine=trl")
    ),
    "AdamW in 8 bits (trl)": Case(
        (20, 60), ("optimizer=adamw_8bit", "lora=r128", "trainer.engine=trl")
    ),
    "evaluation batch 32, training batch 1": Case(
        SHORT,
        (
            "dataset.eval_fraction=0.75",
            "trainer.per_device_train_batch_size=1",
            "trainer.per_device_eval_batch_size=32",
        ),
        rows=44,
    ),
    "Qwen 3, 150,000 words, untied": Case(SHORT, base="qwen3"),
    "Gemma 3, 262,144 words": Case(
        (50, 150),
        ("trainer.per_device_eval_batch_size=4",),
        base="gemma3",
    ),
    "Qwen 3 with 32 experts": Case(SHORT, base="qwen3_moe"),
    "Qwen 3 with 32 experts (trl)": Case(
        SHORT, ("trainer.engine=trl",), base="qwen3_moe"
    ),
    "q_v alone, batch 1": Case(
        SHORT, ("lora/target=q_v", "trainer.per_device_train_batch_size=1")
    ),
    "batch 16 of short rows": Case(
        (20, 60), ("trainer.per_device_train_batch_size=16",), rows=44
    ),
    "r 64 with rsLoRA, dropout": Case(
        SHORT, ("lora=r64", "lora.use_rslora=true", "lora.dropout=0.05")
    ),
    "3 slots, rows of 512": Case(
        (550, 550),
        ("dataset.max_length=512", "trainer.per_device_train_batch_size=2"),
        slots=3,
    ),
    "2 slots": Case(SHORT, slots=2),
    "4 slots": Case(SHORT, slots=4),
}


def main() -> None:
    """Measure the cases that are named, or all, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES))
    names = parser.parse_args().cases
    print("| | planned, GiB | measured, GiB | ratio |\n|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            planned, measured = compare(CASES[name], Path(folder))
        sizes = f"{planned / GIB:.2f} | {measured / GIB:.2f}"
        print(f"| {name} | {sizes} | {planned / measured:.2f} |", flush=True)


def compare(case: Case, folder: Path) -> tuple[int, int]:
    """Plan a case and run it.

    Args:
        case: The case.
        folder: An empty folder for rows, base and run.

    Returns:
        The planned and the measured peak in bytes.
    """
    overrides = [*COMMON, *case.overrides, f"dataset.path={write_rows(case, folder)}"]
    if case.base != "smollm2_135m":
        overrides.append(f"model.name_or_path={write_base(case.base, folder)}")
    plan = ["finetune.plan", *overrides, "--json"]
    planned = json.loads(run_process(plan, folder)[0])
    peak = planned["peak"] + (case.slots - 1) * planned["further_slot"]
    words = ["finetune", *overrides]
    if case.slots > 1:
        words += study_overrides(case.slots)
    return peak, run_process(words, folder)[1]


def study_overrides(slots: int) -> list[str]:
    """A study whose trials differ in the learning rate alone."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        "hydra/sweeper/pruner=none",
        f"hydra.sweeper.n_trials={slots}",
        f"hydra.sweeper.slots={slots}",
        "hydra.sweeper.baseline_seeds=0",
        "hydra.sweeper.params={optimizer.learning_rate: 'interval(0.0001, 0.001)'}",
    ]


def write_rows(case: Case, folder: Path) -> Path:
    """Write rows of text, as long as the case wants."""
    draw = random.Random(0)
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(case.rows):
            words = draw.choices(WORDS, k=draw.randint(*case.words))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def write_base(name: str, folder: Path) -> Path:
    """Write a base of about 100 million random weights, with the packaged base's tokenizer."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3TextConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    from finetune.app import compose_run
    from finetune.model.source import find_base

    packaged = find_base(compose_run([]).model).location
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    shared = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "qwen3_moe":
        config = Qwen3MoeConfig(
            vocab_size=50_000,
            hidden_size=320,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_experts=32,
            num_experts_per_tok=4,
            num_hidden_layers=12,
            **shared,
        )
    elif name == "qwen3":
        config = Qwen3Config(
            vocab_size=150_000,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=16,
            tie_word_embeddings=False,
            **shared,
        )
    else:
        config = Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=320,
            intermediate_size=1024,
            num_hidden_layers=12,
            **shared,
        )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def run_process(words: Sequence[str], folder: Path) -> tuple[str, int]:
    """Run a command of the project.

    Returns:
        What it prints, and the peak resident memory of its largest process in bytes.
    """
    log = folder / "log.txt"
    output = folder / "output.txt"
    with output.open("w") as stdout, log.open("w") as stderr:
        code, peak = run_and_measure(
            [sys.executable, "-m", *words], cwd=folder, stdout=stdout, stderr=stderr
        )
    if code:
        sys.exit(f"{words}:\n{log.read_text()[-2000:]}")
    return output.read_text(), peak


if __name__ == "__main__":
    main()
