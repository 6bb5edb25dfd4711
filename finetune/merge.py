"""A run's adapter merged into its base: `python -m finetune.merge RUN --to DIR`.

The base is dequantised first: what is added to are the very weights that the adapter was trained on, and
nothing is quantised again. What remains between the two is the rounding to 16 bit.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import command_parser, run_command
from finetune.errors import refusal
from finetune.run.load import TrainedRun, load_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


PROBE = "The quick brown fox jumps over the lazy dog. What does it do next?"


def merge(base: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """A base with a saved adapter added to its dequantised weights, in float32. The base must be as it was loaded."""
    import torch
    from peft import PeftModel

    if getattr(base, "is_quantized", False):
        base = base.dequantize(torch.float32)
    merged: PreTrainedModel = PeftModel.from_pretrained(base.float(), adapter).merge_and_unload()
    return merged


def probe(trained: TrainedRun, model: "PreTrainedModel | PeftModel") -> "torch.Tensor":
    """Log-probabilities [tokens, vocabulary] that a model gives to a fixed text, in float32."""
    import torch

    ids = torch.tensor([trained.tokenizer(PROBE)["input_ids"]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits[0]
    return logits.float().log_softmax(-1)


def main() -> None:
    """Read the command line, merge, save, and say what difference the rounding leaves."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--to", required=True, help="a new folder for the merged model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    target = Path(arguments.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise refusal("--to", arguments.to, "exists already; must be a new or an empty folder")
    trained = load_run(arguments.run)
    import torch

    with_adapter = probe(trained, trained.with_adapter())
    # Loaded again: attaching an adapter may change its base for good (PiSSA).
    merged = merge(load_run(arguments.run).base, trained.folder.adapter)
    exact = probe(trained, merged)
    merged = merged.to(getattr(torch, arguments.dtype))
    rounded = probe(trained, merged)
    merged.save_pretrained(target)
    trained.tokenizer.save_pretrained(target)
    before, after = ((found - with_adapter).abs().max() for found in (exact, rounded))
    print(f"merged model in {target}: python -m finetune model.name_or_path={target} starts from it")
    print("largest difference of a log-probability on a fixed text, against the adapter on its quantised base:")
    print(f"{before:.1e} before rounding and {after:.1e} after rounding to {arguments.dtype}")


if __name__ == "__main__":
    run_command(main)
