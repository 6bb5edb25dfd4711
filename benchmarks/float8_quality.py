"""What products in 8-bit floats cost in quality: the same runs with them and without, on a CPU.

    python benchmarks/float8_quality.py [--model smollm2_135m] [--lines blocks_inner,blocks,…]
        [--seeds 5] [--steps 120] [--max-length 128] [--ranking 24] [--folder FOLDER]

A GPU multiplies 8-bit floats twice as fast as bfloat16. Here their rounding is emulated, which says
nothing about speed. All lines but `float32` train in NF4 with bfloat16 as the compute dtype, as on
a GPU. In the lines below the operands of the products with the base's frozen weights are rounded
further; those of the adapters, of attention and of the head never are, and neither is any
evaluation.

    blocks_inner  forward pass in e4m3, a scale for each 128 activations of a token and for each
                  128 x 128 weights; the first and the last decoder block in bfloat16
    blocks        the same in all blocks
    rows          forward pass in e4m3, a scale for each token and for each row of a weight
    both_inner    as blocks_inner, and the backward pass with gradients in e5m2, a scale for each
                  token
    both          as blocks, with that backward pass
    both_e4m3     as both, with gradients in e4m3

A scale is a power of two, so bfloat16 holds each rounded value exactly, and a product of them in
bfloat16 is the product in 8 bits: exact terms, summed up in float32. That is fast on CPUs with
AVX512_BF16 and many times slower on others.

The runs of a line differ in their seeds, train in slots of one bank, and have the seeds of the
reference (`bfloat16`). The table has the final loss on the held-out rows, its standard deviation
over the seeds, and the difference from the reference, seed by seed. A line passes if the mean
difference is at most one standard deviation of the reference. `float32` can be a line too: it shows
what harmless rounding changes.

With `--ranking` so many trials with one seed and different settings (learning rate, r, alpha) train
instead, and the table has Spearman's rank correlation of their losses with the reference's.
`--folder` keeps the runs; those that it has already are not trained again.
"""

import argparse
import contextlib
import math
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import spearmanr
from torch.nn.functional import linear, pad

from finetune.app import compose_run
from finetune.config.schema import RunConfig
from finetune.console import quiet_libraries
from finetune.engine.packed import autograd_backend
from finetune.engine.packed.bank import Bank
from finetune.engine.packed.lora_linear import lora_linear
from finetune.engine.steps import RunSteps
from finetune.files.run_folder import RunFolder
from finetune.model.quantization import dense_weight
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run_steps
from sweeps.study.pack import PackedRun, train_together

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
REFERENCE = "bfloat16"
BLOCK = 128
Operands = tuple[torch.Tensor, torch.Tensor]
"""A layer's weight as the forward and the backward pass multiply by it [out, in]."""


@dataclass(frozen=True)
class Line:
    """Which operands are rounded to 8 bits, and with which scales."""

    by_row: bool = False
    """Whether a scale is for a whole row, instead of a block."""
    gradient: torch.dtype | None = None
    """Of the output's gradient in the backward pass; None: that pass is not rounded."""
    is_inner: bool = False
    """Whether the first and the last decoder block are left out."""


LINES: dict[str, Line | None] = {
    "float32": None,
    REFERENCE: None,
    "blocks_inner": Line(is_inner=True),
    "blocks": Line(),
    "rows": Line(by_row=True),
    "both_inner": Line(gradient=E5M2, is_inner=True),
    "both": Line(gradient=E5M2),
    "both_e4m3": Line(gradient=E4M3),
}
"""None: nothing is rounded to 8 bits."""


def main() -> None:
    """Train the reference and each line, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2_135m", help="of conf/model")
    parser.add_argument("--lines", default="blocks_inner", help="with commas between")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--ranking", type=int, help="trials with different settings")
    parser.add_argument("--folder", type=Path, help="keeps the runs")
    arguments = parser.parse_args()
    lines = arguments.lines.split(",")
    for name in lines:
        if name not in LINES or name == REFERENCE:
            allowed = ", ".join(name for name in LINES if name != REFERENCE)
            parser.error(f"--lines {name}: allowed are {allowed}")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.model
        if arguments.ranking:
            compare_rankings(arguments, lines, folder / "ranking")
        else:
            compare_losses(arguments, lines, folder / "seeds")


def compare_losses(
    arguments: argparse.Namespace, lines: list[str], folder: Path
) -> None:
    """Print each line's losses beside the reference's."""
    runs = [[f"seed={seed}"] for seed in range(arguments.seeds)]
    # One for all lines: it holds the loaded base.
    resources = SharedResources()

    def train(name: str) -> list[float]:
        return train_line(name, runs, arguments, folder / name, resources)

    reference = train(REFERENCE)
    deviation = statistics.stdev(reference)
    print("| line | loss | difference | by seed | passes |\n|---|---|---|---|---|")
    print(f"| {REFERENCE} | {mean_and_deviation(reference)} | | | |", flush=True)
    for name in lines:
        losses = train(name)
        differences = [
            loss - expected for loss, expected in zip(losses, reference, strict=True)
        ]
        by_seed = " ".join(f"{difference:+.4f}" for difference in differences)
        passes = abs(statistics.mean(differences)) <= deviation
        cells = [
            name,
            mean_and_deviation(losses),
            mean_and_deviation(differences, "+"),
            by_seed,
            "yes" if passes else "no",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:{sign}.4f} ± {deviation:.4f}"


def compare_rankings(
    arguments: argparse.Namespace, lines: list[str], folder: Path
) -> None:
    """Print how much each line's ranking of trials is the reference's."""
    runs = random_settings(arguments.ranking)
    resources = SharedResources()

    def train(name: str) -> list[float]:
        return train_line(name, runs, arguments, folder / name, resources)

    reference = train(REFERENCE)
    print(
        f"\n{len(runs)} trials, losses {min(reference):.3f} to {max(reference):.3f}\n"
    )
    print("| line | Spearman | largest difference | its best trial's rank |")
    print("|---|---|---|---|", flush=True)
    for name in lines:
        losses = train(name)
        correlation = spearmanr(reference, losses).statistic
        pairs = list(zip(losses, reference, strict=True))
        largest = max(abs(loss - expected) for loss, expected in pairs)
        _, chosen = min(pairs)
        rank = sorted(reference).index(chosen) + 1
        print(f"| {name} | {correlation:.4f} | {largest:.4f} | {rank} |", flush=True)


def random_settings(count: int) -> list[list[str]]:
    """Draw the overrides of trials: the rate within a factor of 5.6 of SmolLM2's default."""
    draw = random.Random(0)
    runs = []
    for _ in range(count):
        rate = 1e-3 * 10 ** draw.uniform(-0.75, 0.75)
        r = draw.choice([4, 8, 16, 32, 64])
        alpha = r * draw.choice([1, 2, 4]) // 2
        runs.append(
            [
                f"optimizer.learning_rate={rate:.3e}",
                f"lora.r={r}",
                f"lora.alpha={alpha}",
            ]
        )
    return runs


def train_line(
    name: str,
    runs: list[list[str]],
    arguments: argparse.Namespace,
    folder: Path,
    resources: SharedResources,
) -> list[float]:
    """Train runs together.

    Args:
        name: Of the line.
        runs: The overrides of each run.
        arguments: Of the command line.
        folder: Of the line's runs.
        resources: Hold the base.

    Returns:
        The final loss of each run; infinite where it failed.
    """
    dtype = "float32" if name == "float32" else "bfloat16"
    losses = [math.inf] * len(runs)

    def steps(number: int, config: RunConfig, path: Path) -> RunSteps[None]:
        context = RunContext(
            resources=resources,
            interactive=False,
            evaluate_test_rows=False,
            slots=len(runs),
        )
        objective = yield from run_steps(config, RunFolder(path), context)
        assert isinstance(objective, float)
        losses[number] = objective

    packed_runs = []
    for number, overrides in enumerate(runs):
        config = compose_run(
            [
                f"model={arguments.model}",
                f"quantization.bnb_4bit_compute_dtype={dtype}",
                f"dataset.max_length={arguments.max_length}",
                f"trainer.max_steps={arguments.steps}",
                "trainer.eval_steps=0",
                "trainer.save_steps=0",
                "sample_prompts=[]",
                "tracker=none",
                *overrides,
            ]
        )
        path = folder / str(number)
        path.mkdir(parents=True, exist_ok=True)
        run = PackedRun(
            str(number), steps(number, config, path), path / "train.log", set()
        )
        packed_runs.append(run)
    waiting = iter(packed_runs)
    line = LINES[name]
    emulation = contextlib.nullcontext() if line is None else emulated(line)
    with emulation:
        train_together(lambda: next(waiting, None), len(runs))
    return losses


@contextlib.contextmanager
def emulated(line: Line) -> Iterator[None]:
    """Round the operands of the base's products in every training pass; in no evaluation."""
    plain_pass: Callable[..., Any] = Bank.forward_backward
    weights: dict[torch.nn.Module, Operands] = {}

    def rounded_linear(
        x: torch.Tensor,
        anchor: torch.Tensor,
        output: torch.Tensor | None,
        layer: torch.nn.Module,
        slot_tokens: Any,
    ) -> torch.Tensor:
        if layer in weights:
            output = frozen_product(x, layer, weights[layer], line)
        return lora_linear(x, anchor, output, layer, slot_tokens)

    def forward_backward(self: Bank, requests: Any) -> Any:
        if not weights:
            weights.update(round_weights(self.base, line))
        with patch.object(autograd_backend, "lora_linear", rounded_linear):
            return plain_pass(self, requests)

    with patch.object(Bank, "forward_backward", forward_backward):
        yield


def round_weights(base: Any, line: Line) -> dict[torch.nn.Module, Operands]:
    """Round the weights of the decoder blocks' linear layers, once for all steps."""
    last_block = base.config.get_text_config().num_hidden_layers - 1
    weights: dict[torch.nn.Module, Operands] = {}
    for name, layer in base.named_modules():
        block = re.search(r"\blayers\.(\d+)\.", name)
        if block is None or not isinstance(layer, torch.nn.Linear):
            continue
        if line.is_inner and int(block[1]) in (0, last_block):
            continue
        weight = dense_weight(layer)
        tile = (1, weight.shape[1]) if line.by_row else (BLOCK, BLOCK)
        rounded = round_to(E4M3, weight, tile)
        weights[layer] = (rounded, weight if line.gradient is None else rounded)
    return weights


class _FrozenProduct(torch.autograd.Function):
    """A frozen linear layer whose operands are rounded. Arguments as `frozen_product` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: torch.nn.Module,
        operands: Operands,
        line: Line,
    ) -> torch.Tensor:
        ctx.line = line
        forward_weight, ctx.weight = operands
        tile = (1, x.shape[-1] if line.by_row else BLOCK)
        rounded = round_to(E4M3, x.flatten(0, -2), tile)
        y = linear(rounded, forward_weight, getattr(layer, "bias", None))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = grad_outputs
        if ctx.line.gradient is not None:
            rows = gradient.flatten(0, -2)
            rounded = round_to(ctx.line.gradient, rows, (1, rows.shape[-1]))
            gradient = rounded.view(gradient.shape)
        return gradient @ ctx.weight, None, None, None


frozen_product: Callable[..., torch.Tensor] = _FrozenProduct.apply


def round_to(
    dtype: torch.dtype, values: torch.Tensor, tile: tuple[int, int]
) -> torch.Tensor:
    """Round a matrix to 8-bit floats.

    Args:
        dtype: The 8-bit dtype.
        values: The matrix [rows, columns].
        tile: Rows and columns that have a scale together; at the ends there may be fewer.

    Returns:
        The rounded values in the dtype of `values`.
    """
    rows, columns = values.shape
    height, width = tile
    padded = pad(values, (0, -columns % width, 0, -rows % height))
    down, across = len(padded) // height, padded.shape[1] // width
    tiles = padded.view(down, height, across, width)
    largest = tiles.abs().amax((1, 3), keepdim=True).float()
    # The smallest power of two with which no value is beyond the dtype's largest one.
    exponent = torch.ceil(torch.log2(largest / torch.finfo(dtype).max))
    # A tile of zeros has any scale.
    scale = torch.exp2(exponent.clamp(min=-100)).to(values.dtype)
    rounded: torch.Tensor = (tiles / scale).to(dtype).to(values.dtype) * scale
    return rounded.view(padded.shape)[:rows, :columns]


if __name__ == "__main__":
    main()
