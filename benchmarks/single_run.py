"""One run of this project against a plain TRL script with the same recipe, step by step in turns.

    python benchmarks/single_run.py [--steps 12]

All train NF4 and LoRA r 16 on all linear layers, AdamW, batch 4, on rows of exactly 128 tokens, so that all do
the same work whatever their order of rows. None evaluates or saves on the way. The plain script runs as TRL has
it (it rounds the adapter's weights to bfloat16) and with the adapter in float32, as this project keeps it.

For the speed, all train in one process, one step each in turn, so that a machine whose speed drifts treats them
alike; a step's time runs until the next begins, optimizer and logging included, and ratios are taken turn by turn.
Peak memory is a whole process's that trains three steps alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LENGTH, BATCH = 128, 4
OURS, FLOAT32, PLAIN = "this project", "plain TRL, float32 adapter", "plain TRL as it is"


def main() -> None:
    """Take the turns, measure the memory and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--alone", choices=[OURS, FLOAT32, PLAIN], help="train one side, three steps, and say nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.alone:
            prepare(folder, 3)
            train(arguments.alone, folder, 3)
            return
        # First: a child's peak is at least what its parent had when it was forked.
        memory = {name: peak_memory(name) for name in (OURS, FLOAT32, PLAIN)}
        prepare(folder, arguments.steps)
        seconds = in_turns(folder, arguments.steps)
    print_table(seconds, memory)


def prepare(folder: Path, steps: int) -> None:
    """Plain text rows, each longer than LENGTH tokens, so that each is cut to exactly as many."""
    from finetune.cli import quiet_libraries
    from finetune.python_docs import question_answer_pairs

    quiet_libraries()
    answers = [row["completion"] for row in question_answer_pairs()]
    texts = [" ".join(answers[(start * 7 + n) % len(answers)] for n in range(20)) for start in range(steps * BATCH)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def train(side: str, folder: Path, steps: int) -> None:
    """Train one side from loading to its last step."""
    if side == OURS:
        train_ours(folder, steps)
    else:
        train_plainly(folder, steps, float32=side == FLOAT32)


def train_ours(folder: Path, steps: int) -> None:
    """What `python -m finetune` does with these overrides."""
    from hydra import compose, initialize_config_dir

    from finetune.cli import CONF
    from finetune.config import RunConfig
    from finetune.run import run

    overrides = [
        f"dataset.path={folder / 'rows.jsonl'}",
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


def train_plainly(folder: Path, steps: int, float32: bool) -> None:
    """The script that people write around TRL."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from finetune.hub import PACKAGED

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
    )
    for weight in trainer.model.parameters():
        if float32 and weight.requires_grad:
            weight.data = weight.data.float()
    trainer.train()


class Turns:
    """Lets threads work one at a time, each from the beginning of one of its training steps to the next."""

    def __init__(self, names: list[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._waiting, self._turn, self._changed = list(names), names[0], threading.Condition()
        self._began = 0.0

    def next(self) -> None:
        """End the calling thread's turn, and wait for its next."""
        name = threading.current_thread().name
        with self._changed:
            if self._turn == name and self._began:
                self.seconds[name].append(time.perf_counter() - self._began)
                self._pass_on(name)
            self._changed.wait_for(lambda: self._turn == name)
            self._began = time.perf_counter()

    def leave(self) -> None:
        """Take no more turns."""
        name = threading.current_thread().name
        with self._changed:
            if self._turn == name:
                self._pass_on(name)
            self._waiting.remove(name)

    def _pass_on(self, name: str) -> None:
        self._turn = self._waiting[(self._waiting.index(name) + 1) % len(self._waiting)]
        self._began = 0.0
        self._changed.notify_all()


def in_turns(folder: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of each side's steps. The first two steps, which warm up caches, and the last are left out."""
    names = [OURS, FLOAT32, PLAIN]
    turns, failures = Turns(names), []

    def work(name: str) -> None:
        try:
            train(name, folder / name.replace(" ", "-"), steps)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            turns.leave()

    for name in names:
        (folder / name.replace(" ", "-")).mkdir()
        (folder / name.replace(" ", "-") / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    with taking(turns):
        threads = [threading.Thread(target=work, args=(name,), name=name) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise SystemExit(f"failed: {failures[0]}")
    return {name: seconds[2:] for name, seconds in turns.seconds.items()}


@contextmanager
def taking(turns: Turns) -> Iterator[None]:
    """Make every training step of TRL's begin with `turns.next()`."""
    from trl import SFTTrainer

    original: Callable[..., Any] = SFTTrainer.training_step

    def training_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        turns.next()
        return original(self, *arguments, **keywords)

    SFTTrainer.training_step = training_step
    try:
        yield
    finally:
        SFTTrainer.training_step = original


def peak_memory(side: str) -> int:
    """The most memory in bytes that a process had which trained one side."""
    process = subprocess.Popen([sys.executable, __file__, "--alone", side], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed alone: {side}")
    return usage.ru_maxrss * 1024


def print_table(seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Medians of each side, and of this project's ratios to the others."""
    print("\n| | tokens/s | peak memory, GiB |\n|---|---|---|")
    for name, steps in seconds.items():
        print(f"| {name} | {LENGTH * BATCH / statistics.median(steps):.1f} | {memory[name] / 2**30:.2f} |")
    for other in (FLOAT32, PLAIN):
        ratios = [theirs / ours for ours, theirs in zip(seconds[OURS], seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = f"{middle:.3f} (middle half {low:.3f} to {high:.3f})"
        print(f"| {OURS} / {other} | {speed} | {memory[OURS] / memory[other]:.3f} |")


if __name__ == "__main__":
    main()
