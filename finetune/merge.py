"""A run's adapter merged into its base: `python -m finetune.merge RUN --to DIR`.

The base is dequantised first: what is added to are the very weights that the adapter was trained on, and
nothing is quantised again. What remains between the two is the rounding to 16 bit.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.cli import command_parser, run_command
from finetune.config import refusal
from finetune.records import RunFolder
from finetune.trained import TrainedRun, load_run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE = "The quick brown fox jumps over the lazy dog. What does it do next?"


def dequantize(model: "PreTrainedModel") -> "PreTrainedModel":
    """A quantised base as an ordinary float32 model with the weights that training saw; in place."""
    from peft.utils.integrations import dequantize_module_weight

    quantized = [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    ]
    for name in quantized:
        layer = model.get_submodule(name)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(dequantize_module_weight(layer).float(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    model.hf_quantizer = None
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def merge(model: "PeftModel", adapter: Path) -> "PreTrainedModel":
    """The base of a PEFT model with its saved adapter added to the dequantised weights, in float32."""
    from peft import PeftModel

    base = dequantize(model.unload())
    merged: PreTrainedModel = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return merged


def probe(trained: TrainedRun, model: "PreTrainedModel | PeftModel") -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] that a model gives to a fixed text, in float32."""
    ids = torch.tensor([trained.tokenizer(PROBE)["input_ids"]], device=next(model.parameters()).device)
    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float().log_softmax(-1)


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
    with_adapter = probe(trained, trained.model)
    merged = merge(trained.model, RunFolder(arguments.run).adapter)
    exact = probe(trained, merged)
    merged = merged.to(getattr(torch, arguments.dtype))
    rounded = probe(trained, merged)
    merged.save_pretrained(target)
    trained.tokenizer.save_pretrained(target)
    print(f"merged model in {target}: python -m finetune model.name_or_path={target} starts from it")
    print(f"largest difference of a log-probability on a fixed text, against the adapter on its base: "
          f"{(exact - with_adapter).abs().max():.1e} before and {(rounded - with_adapter).abs().max():.1e} after rounding to {arguments.dtype}")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
