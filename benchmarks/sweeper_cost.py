"""What the sweeper itself costs for each trial, training aside.

    python benchmarks/sweeper_cost.py [--more 20] [--pairs 3]

A study of few and of many trials, and plain multiruns of as many jobs, in turns: all train three
steps of a Llama with two layers and random weights, on the same rows, with the same evaluations.
What one more trial costs is the difference of many and few by their number, so that starting and
loading do not count; what one more job costs is subtracted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW = 4


def main() -> None:
    """Time them in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--more",
        type=int,
        default=20,
        help="trials of the larger study beyond those of the smaller",
    )
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    trials, jobs = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        for turn in range(arguments.pairs):
            many = FEW + arguments.more
            trials.append(
                (study(folder, f"many{turn}", many) - study(folder, f"few{turn}", FEW))
                / arguments.more
            )
            jobs.append(
                (multirun(folder, many) - multirun(folder, FEW)) / arguments.more
            )
    trial, job = statistics.median(trials), statistics.median(jobs)
    print("| | seconds |\n|---|---|")
    print(
        f"| one more trial | {trial:.3f} |\n| one more job | {job:.3f} |\n| the sweeper's own | {trial - job:.3f} |"
    )


def make_base(folder: Path) -> None:
    """A Llama of two layers with random weights, and the packaged model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from finetune.app import compose_run
    from finetune.run.resources import SharedResources

    tokenizer = AutoTokenizer.from_pretrained(
        SharedResources().source(compose_run([]).model).location
    )
    torch.manual_seed(0)
    shapes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        **shapes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


COMMON = [
    "model.name_or_path=base", "quantization=none", "tracker=none", "trainer.max_steps=3", "trainer.save_steps=0",
    "dataset.limit=24", "dataset.eval_fraction=0.02", "dataset.test_fraction=0", "sample_prompts=[]", "-m",
]  # fmt: skip


def study(folder: Path, name: str, trials: int) -> float:
    """Seconds of a study that prunes nothing."""
    more = [
        f"hydra.sweeper.study_name={name}",
        f"hydra.sweeper.n_trials={trials}",
        "hydra/sweeper/pruner=none",
    ]
    return timed(folder, [*COMMON, "hydra/sweeper=optuna", *more])


def multirun(folder: Path, jobs: int) -> float:
    """Seconds of a plain multirun."""
    return timed(folder, [*COMMON, f"seed=range({jobs})"])


def timed(folder: Path, arguments: list[str]) -> float:
    """Wall time of a command, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
