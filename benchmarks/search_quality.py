"""What a search loses by asking for several trials at once: the best loss so far.

    python benchmarks/search_quality.py [--seeds 10] [--trials 16] [--jobs 2] [--steps 40]
    [--slots 1,4,8] [--schedules constant,cosine]

Trials that train together in K slots are asked for before their companions' losses are known. Here
whole studies run for each K, seed and schedule, unpruned, with the default space and sampler, on a
Llama of two layers with random weights: the best loss after n trials shows what knowing less
costs. `replay_pruners.py` and `replay_study.py` show what pruning does.
"""

import argparse
import concurrent.futures
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

AFTER = (4, 8, 12, 16, 32)
Curve = list[float]
"""A trial's loss at each rung."""
Curves = dict[tuple[str, int], list[list[Curve]]]
"""By schedule and slots, each seed's study."""


def main() -> None:
    """Run the studies, and print the best losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="studies at once, each on one core",
    )
    parser.add_argument("--steps", type=int, default=40, help="of a trial")
    parser.add_argument("--slots", default="1,4,8")
    parser.add_argument("--schedules", default="constant,cosine")
    arguments = parser.parse_args()
    kinds = [
        (schedule, int(slots))
        for schedule in arguments.schedules.split(",")
        for slots in arguments.slots.split(",")
    ]
    length = (arguments.trials, arguments.steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        cells = [(*kind, seed) for kind in kinds for seed in range(arguments.seeds)]
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            found = list(pool.map(lambda cell: study(folder, *length, *cell), cells))
    curves = {
        kind: [own for cell, own in zip(cells, found, strict=True) if cell[:2] == kind]
        for kind in kinds
    }
    print_best(curves, arguments.trials)


def make_base(folder: Path) -> None:
    """A small Llama with random weights, and a tokenizer learnt from the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finetune.data.python_docs import question_answer_pairs

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(
        (text for row in question_answer_pairs() for text in row.values()), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    shapes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(shapes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def study(
    folder: Path,
    trials: int,
    steps: int,
    schedule: str,
    slots: int,
    seed: int,
) -> list[Curve]:
    """The curves of one unpruned study, by trial."""
    name = f"{schedule}-{slots}-{seed}"
    command = [
        sys.executable, "-m", "finetune", "-m", "hydra/sweeper=optuna", "hydra/sweeper/pruner=none",
        f"hydra.sweeper.study_name={name}", f"hydra.sweeper.n_trials={trials}", f"hydra.sweeper.slots={slots}",
        f"hydra.sweep.dir={folder / name}", f"model.name_or_path={folder / 'base'}", f"seed={seed}",
        f"optimizer.lr_scheduler_type={schedule}", "optimizer.warmup_ratio=0",
        f"trainer.max_steps={steps}", f"trainer.logging_steps={steps}",
        "trainer.save_steps=0", "tracker=none", "sample_prompts=[]", "quantization=none", "dataset.max_length=128",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    from sweeps.study.study import Study

    found = Study.load(folder / name).trials()
    return [
        [trial.intermediate_values[rung] for rung in sorted(trial.intermediate_values)]
        for trial in found
    ]


def print_best(curves: Curves, trials: int) -> None:
    """The best loss after so many trials, over the seeds."""
    counts = [count for count in AFTER if count <= trials]
    print(
        f"| schedule | slots | {' | '.join(f'after {count} trials' for count in counts)} |"
    )
    print(f"|---|---|{'---|' * len(counts)}")
    for (schedule, slots), studies in curves.items():
        cells = []
        for count in counts:
            best = [min(curve[-1] for curve in study[:count]) for study in studies]
            cells.append(
                f"{statistics.mean(best):.4f} ± {statistics.stdev(best) / len(best) ** 0.5:.4f}"
            )
        print(f"| {schedule} | {slots} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
