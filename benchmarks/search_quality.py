"""What a search loses by asking for several trials at once, and by pruning: best loss so far, pruned winners.

    python benchmarks/search_quality.py [--seeds 10] [--trials 16] [--jobs 2]

Trials that train together in K slots are asked for before their companions' losses are known. Here whole studies
run for each K, seed and schedule, unpruned, with the default space and sampler, on a Llama of two layers with
random weights (trials of 40 steps, four rungs): the best loss after n trials shows what knowing less costs. The
pruners are then replayed on the curves of each study, K trials reporting a rung before any is judged: a winner is
lost where the trial that ended best is not among those that are left.
"""

import argparse
import concurrent.futures
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna

SLOTS = (1, 4, 8)
SCHEDULES = ("constant", "cosine")
AFTER = (4, 8, 12, 16)
Curve = list[float]
"""A trial's loss at each rung."""


def main() -> None:
    """Run the studies, replay the pruners, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="studies at once, each on one core")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        cells = [
            (schedule, slots, seed) for schedule in SCHEDULES for slots in SLOTS for seed in range(arguments.seeds)
        ]
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            curves = dict(zip(cells, pool.map(lambda cell: study(folder, arguments.trials, *cell), cells), strict=True))
    print_best(curves, arguments.trials, arguments.seeds)
    print_pruning(curves, arguments.seeds)


def make_base(folder: Path) -> None:
    """A small Llama with random weights, and a tokenizer learnt from the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finetune.python_docs import question_answer_pairs

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((text for row in question_answer_pairs() for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    shapes = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shapes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def study(folder: Path, trials: int, schedule: str, slots: int, seed: int) -> list[Curve]:
    """The curves of one unpruned study, by trial."""
    name = f"{schedule}-{slots}-{seed}"
    command = [
        sys.executable, "-m", "finetune", "-m", "hydra/sweeper=optuna", "hydra/sweeper/pruner=none",
        f"hydra.sweeper.study_name={name}", f"hydra.sweeper.n_trials={trials}", f"hydra.sweeper.slots={slots}",
        f"hydra.sweep.dir={folder / name}", f"model.name_or_path={folder / 'base'}", f"seed={seed}",
        f"optimizer.lr_scheduler_type={schedule}", "optimizer.warmup_ratio=0", "trainer.max_steps=40",
        "trainer.save_steps=0", "trainer.logging_steps=40", "tracker=none", "sample_prompts=[]",
        "quantization=none", "dataset.max_length=128",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    from sweeps.study import Study

    found = Study.load(folder / name).trials()
    return [[trial.intermediate_values[rung] for rung in sorted(trial.intermediate_values)] for trial in found]


def print_best(curves: dict[tuple[str, int, int], list[Curve]], trials: int, seeds: int) -> None:
    """The best loss after so many trials, over the seeds."""
    counts = [count for count in AFTER if count <= trials]
    print(f"| schedule | slots | {' | '.join(f'after {count} trials' for count in counts)} |")
    print(f"|---|---|{'---|' * len(counts)}")
    for schedule in SCHEDULES:
        for slots in SLOTS:
            cells = []
            for count in counts:
                best = [min(curve[-1] for curve in curves[schedule, slots, seed][:count]) for seed in range(seeds)]
                cells.append(f"{statistics.mean(best):.4f} ± {statistics.stdev(best) / seeds**0.5:.4f}")
            print(f"| {schedule} | {slots} | {' | '.join(cells)} |")
    print()


def print_pruning(curves: dict[tuple[str, int, int], list[Curve]], seeds: int) -> None:
    """How often a pruner loses the winner, what that costs, and what of the steps it saves."""
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "successive halving by 2": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=2, bootstrap_count=0
        ),
        "successive halving by 3": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=3, bootstrap_count=0
        ),
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0),
    }
    print("| schedule | slots | pruner | winners lost | loss given away | steps saved |\n|---|---|---|---|---|---|")
    for schedule in SCHEDULES:
        for slots in SLOTS:
            for name, make in pruners.items():
                lost, given, kept = 0, 0.0, 0.0
                for seed in range(seeds):
                    own = curves[schedule, slots, seed]
                    rungs = replay(own, slots, make())
                    best = min(curve[-1] for curve in own)
                    left = min(curve[-1] for curve, seen in zip(own, rungs, strict=True) if seen == len(curve))
                    lost += left > best
                    given += left - best
                    kept += sum(rungs) / sum(map(len, own))
                figures = f"{lost} of {seeds} | {given / seeds:.4f} | {1 - kept / seeds:.0%}"
                print(f"| {schedule} | {slots} | {name} | {figures} |")


def replay(curves: Sequence[Curve], slots: int, pruner: optuna.pruners.BasePruner) -> list[int]:
    """How many rungs each trial reaches; the first is the baseline, which is never pruned."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    replayed = optuna.create_study(pruner=pruner)
    reached = [0] * len(curves)
    waiting = list(range(len(curves)))
    live: dict[int, optuna.Trial] = {}
    while waiting or live:
        while waiting and len(live) < slots:
            live[waiting.pop(0)] = replayed.ask()
        for number, trial in live.items():
            reached[number] += 1
            trial.report(curves[number][reached[number] - 1], reached[number])
        for number, trial in list(live.items()):
            if reached[number] == len(curves[number]):
                replayed.tell(live.pop(number), curves[number][-1])
            elif number and trial.should_prune():
                replayed.tell(live.pop(number), state=optuna.trial.TrialState.PRUNED)
    return reached


if __name__ == "__main__":
    main()
