"""Merge a run's adapter into its base: `python -m finetune.merge RUN --to FOLDER`.

The base is dequantised first, so the adapter is added to the very weights that it was trained on,
and nothing is quantised again. The merged model differs only by rounding to 16 bits.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compat import forget_quantized_format
from finetune.console import command_parser, log_to_stderr, run_command
from finetune.data.encoding import Encoder
from finetune.errors import refusal
from finetune.files.atomic import replace_folder
from finetune.files.find_run import RUN_HELP, find_run
from finetune.model.base_quantization import (
    BITSANDBYTES,
    DEQUANTIZED,
    base_quantization,
    read_config_json,
)
from finetune.model.origin import generation_config_with_ends, write_generation_config
from finetune.model.source import find_base
from finetune.model.tokenizer import save_tokenizer
from finetune.run.load import TrainedRun, load_run, read_trained_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


PROBE = "The quick brown fox jumps over the lazy dog. What does it do next?"
"""The text on which the merged model is compared with the adapter on its base."""


ACCEPTED_SHARE = 0.1
"""Share of the adapter's effect, as a divergence, up to which a difference is called fine.

The largest difference alone says little: most often it is that of a very unlikely token.
"""


def main() -> None:
    """Read the command line, merge, save, print the differences that merging and rounding leave."""
    arguments = _parse_arguments()
    folder = Path(arguments.to)
    is_file = folder.exists() and not folder.is_dir()
    if is_file or (folder.is_dir() and any(folder.iterdir())):
        reason = "exists already; must be a new or an empty folder"
        raise refusal("--to", arguments.to, reason)
    run_folder = find_run("RUN", arguments.run)
    _require_mergeable(run_folder)
    log_to_stderr(__name__, "finetune.run.load")
    run = load_run(run_folder)
    # First, because attaching an adapter may change its base (PiSSA).
    base = probe(run, run.base)
    expected = probe(run, run.with_adapter())
    log.info("merging adapter and base")
    # Loaded again, for the same reason.
    merged = merge(load_run(run_folder).base, run.folder.adapter)
    # Measured twice, to tell a wrong merge from the loss by rounding.
    exact = probe(run, merged)
    merged = _round(merged, arguments.dtype)
    rounded = probe(run, merged)
    log.info("saving the merged model")
    _save(merged, run, folder)
    start = f"python -m finetune model.name_or_path={folder}"
    print(f"merged model in {folder}: {start} starts from it")
    difference = _largest_difference(expected, exact)
    difference_rounded = _largest_difference(expected, rounded)
    print(
        "largest difference of a log-probability on a fixed text, against the adapter on its "
        "quantised base:"
    )
    print(
        f"{difference:.1e} before rounding and {difference_rounded:.1e} "
        f"after rounding to {arguments.dtype}"
    )
    verdict = judge_divergences(
        exact=_divergence(expected, exact),
        rounded=_divergence(expected, rounded),
        effect=_divergence(expected, base),
        dtype=arguments.dtype,
    )
    print(verdict)


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        "finetune.merge",
        "Merge the adapter of a run into its base.",
        "latest --to merged",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        required=True,
        help="a new folder for the merged model",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="dtype of the merged weights (default: bfloat16)",
    )
    return parser.parse_args()


def _require_mergeable(folder: Path) -> None:
    """Refuse a run whose base is quantised by a method that can't be undone here."""
    config = read_trained_config(folder)
    base_values = read_config_json(find_base(config.model))
    quantization = base_quantization(base_values)
    if quantization is None or quantization.method in BITSANDBYTES | DEQUANTIZED:
        return
    name = config.model.name_or_path
    reason = f"its base {name} is quantised ({quantization.method}), and can't be merged into"
    raise refusal(
        "RUN", folder, f"{reason}; serve base and adapter apart: vllm --enable-lora"
    )


def _save(merged: "PreTrainedModel", run: TrainedRun, folder: Path) -> None:
    """Save the merged model, its tokenizer and its generation config, completely or not at all."""
    from transformers import GenerationConfig

    ends = Encoder(run.tokenizer, run.config.model.template_kwargs).ends
    generation_config = generation_config_with_ends(run.base, ends)
    # Saving checks the model's own one, and refuses those of many bases.
    merged.generation_config = GenerationConfig()
    with replace_folder(folder) as draft:
        merged.save_pretrained(draft)
        write_generation_config(generation_config, draft)
        save_tokenizer(run.tokenizer, draft)


def merge(base: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """Add a saved adapter to the dequantised weights of a base, in float32.

    Args:
        base: the base as it was loaded, with no adapter attached before.
        adapter: the folder of a PEFT adapter.
    """
    import torch

    from finetune.model.adapter import attach_adapter
    from finetune.model.quantized_layers import restore_transposed_layers

    if getattr(base, "is_quantized", False):
        base = base.dequantize(torch.float32)
        forget_quantized_format(base)
        restore_transposed_layers(base)
    adapted = attach_adapter(base.float(), adapter)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def probe(run: TrainedRun, model: "PreTrainedModel | PeftModel") -> "torch.Tensor":
    """Return the log-probabilities [tokens, vocabulary] of a model on a fixed text, in float32."""
    import torch

    device = next(model.parameters()).device
    encoded = run.tokenizer(PROBE)
    ids = torch.tensor([encoded["input_ids"]], device=device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits[0]
    return logits.float().log_softmax(-1)


def judge_divergences(exact: float, rounded: float, effect: float, dtype: str) -> str:
    """Say in words whether a merged model still does what its adapter does.

    Args:
        exact: divergence of the merged model from the adapter on its base, before rounding.
        rounded: the same after rounding.
        effect: divergence of the base without the adapter.
        dtype: what the weights are rounded to.
    """
    limit = ACCEPTED_SHARE * effect
    share = f"{ACCEPTED_SHARE:.0%} of what the adapter changes"
    if not exact <= limit:
        return f"not fine: merging alone differs by more than {share}; serve base and adapter apart"
    if not rounded <= limit:
        return (
            f"not fine: rounding to {dtype} costs more than {share}; use --dtype float32, or "
            "serve base and adapter apart"
        )
    return f"fine: below {share}"


def _divergence(expected: "torch.Tensor", actual: "torch.Tensor") -> float:
    """Return the mean Kullback-Leibler divergence of predictions, in nats per token."""
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


def _largest_difference(expected: "torch.Tensor", actual: "torch.Tensor") -> float:
    return float((actual - expected).abs().max())


def _round(model: "PreTrainedModel", dtype: str) -> "PreTrainedModel":
    import torch

    rounded: PreTrainedModel = model.to(getattr(torch, dtype))
    return rounded


if __name__ == "__main__":
    run_command(main)
