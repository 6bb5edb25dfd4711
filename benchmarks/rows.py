"""Time and memory of a run on many rows, with an empty cache and again with a full one.

    python benchmarks/rows.py [--rows 2000000] [--words 30]

The rows are chats of a question and an answer, each of 5 to so many random words. The base is a
Llama of two layers with random weights, which trains two steps after an evaluation of 1,000 rows.
Memory is that of all processes of the command together, read every half second; pages that several
share are counted for each.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from sweeper_cost import make_base

PHASES = {
    "format chat": "rows read and converted",
    "no GPU: training": "rows split and tokenised",
    "step 0/2": "first evaluation",
    "completed": "end",
}
"""The first line of the log after each phase; on a GPU the second is missing."""


def main() -> None:
    """Run twice, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--words", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        write_rows(folder / "rows.jsonl", arguments.rows, arguments.words)
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        print(f"{arguments.rows:,} rows, {size:,.0f} MB")
        print("| | seconds until | GiB until |\n|---|---|---|")
        for name in ("first time", "second time"):
            for phase, (seconds, peak) in run(folder).items():
                print(f"| {name}: {phase} | {seconds:.1f} | {peak:.2f} |", flush=True)


def write_rows(file: Path, count: int, words: int) -> None:
    """Write chats of random words as JSON lines."""
    generator = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        "".join(generator.choices(letters, k=generator.randint(3, 9)))
        for _ in range(20_000)
    ]

    def text() -> str:
        return " ".join(generator.choices(vocabulary, k=generator.randint(5, words)))

    with file.open("w") as lines:
        for _ in range(count):
            messages = [
                {"role": "user", "content": f"{text()}?"},
                {"role": "assistant", "content": f"{text()}."},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def run(folder: Path) -> dict[str, tuple[float, float]]:
    """Run the command; seconds from its start and largest memory in GiB, by phase."""
    command = [
        sys.executable, "-m", "finetune", "model.name_or_path=base", "quantization=none",
        "dataset.path=rows.jsonl", "tracker=none", "trainer.max_steps=2",
        "trainer.eval_steps=0", "dataset.test_fraction=0", "sample_prompts=[]",
    ]  # fmt: skip
    environment = {**os.environ, "FINETUNE_CACHE": str(folder / "cache")}
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = [0]
    threading.Thread(target=watch, args=(process, peak), daemon=True).start()
    assert process.stdout is not None
    phases = {}
    for line in process.stdout:
        for beginning, phase in PHASES.items():
            if beginning in line:
                phases[phase] = (time.perf_counter() - began, peak[0] / 2**30)
    assert process.wait() == 0
    return phases


def watch(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    """Keep the largest resident memory of a process and its children, in bytes."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            tree = [root, *root.children(recursive=True)]
            resident = sum(member.memory_info().rss for member in tree)
            peak[0] = max(peak[0], resident)
        except psutil.Error:
            pass  # a process has just ended
        time.sleep(0.5)


if __name__ == "__main__":
    main()
