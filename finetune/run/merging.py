"""An adapter merged into its base, and what merging and rounding change.

The base is dequantised first, so the adapter is added to the very weights that it was trained on,
and nothing is quantised again. The merged model differs only by rounding to 16 bits.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from finetune.compat import forget_quantized_format, import_model_libraries
from finetune.config.sections.model import ModelSettings
from finetune.console import quiet_libraries
from finetune.data.encoding import Encoder
from finetune.errors import refusal
from finetune.files.atomic import create_new_folder, read_json
from finetune.files.run_folder import RunFolder
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS
from finetune.model.base_config import read_published_config, text_model_config
from finetune.model.base_quantization import (
    BITSANDBYTES,
    DEQUANTIZED,
    base_quantization,
    read_config_json,
)
from finetune.model.origin import generation_config_with_ends, write_generation_config
from finetune.model.source import BaseSource, find_base
from finetune.model.tokenizer import save_tokenizer
from finetune.run.load import TrainedRun, load_run, read_trained_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.run.load")
"""Loggers whose lines a command that merges prints."""

PROBE = "The quick brown fox jumps over the lazy dog. What does it do next?"
"""The text on which the merged model is compared with the adapter on its base."""

LORA_BIAS = ".lora_B.bias"
"""The end of the name of a bias in an adapter's weights file."""

ACCEPTED_SHARE = 0.1
"""Share of the adapter's effect, as a divergence, up to which a difference is called fine.

The largest difference alone says little: most often it is that of a very unlikely token.
"""


@dataclass(frozen=True)
class MergedModel:
    """A merged model that was saved, and how it differs from the adapter on its quantised base."""

    path: Path
    """The folder of the merged model."""
    difference: float
    """Largest difference of a log-probability on a fixed text, before rounding, in nats."""
    difference_rounded: float
    """The same after rounding to 16 bits, or to the chosen dtype."""
    effect: float
    """What the adapter changes: mean divergence of the base without it, in nats per token."""
    dtype: str
    """What the weights are rounded to."""
    verdict: str
    """Whether that is little beside what the adapter changes, as the command says it."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "folder": str(self.path),
            "dtype": self.dtype,
            "difference": self.difference,
            "difference_rounded": self.difference_rounded,
            "effect": self.effect,
            "verdict": self.verdict,
        }


def merge_run(run_folder: Path, folder: Path, dtype: str) -> MergedModel:
    """Merge the adapter of a run into its base, and save the model.

    Args:
        run_folder: the run folder.
        folder: the folder of the merged model.
        dtype: what its weights are rounded to: one of `DTYPES`.

    Raises:
        ConfigError: the run has no adapter, or a base that can't be merged into.
    """
    require_mergeable(run_folder)
    run = load_run(run_folder)
    # First, because attaching an adapter may change its base (PiSSA).
    base = probe(run, run.base)
    expected = probe(run, run.with_adapter())
    log.info("merging adapter and base")
    # Loaded again, for the same reason.
    merged = merge(load_run(run_folder).base, run.folder.adapter)
    # Measured twice, to tell a wrong merge from the loss by rounding.
    exact = probe(run, merged)
    merged = _round(merged, dtype)
    rounded = probe(run, merged)
    log.info("saving the merged model")
    _save(merged, run, folder)
    effect = _divergence(expected, base)
    verdict = judge_divergences(
        exact=_divergence(expected, exact),
        rounded=_divergence(expected, rounded),
        effect=effect,
        dtype=dtype,
    )
    return MergedModel(
        path=folder,
        difference=_largest_difference(expected, exact),
        difference_rounded=_largest_difference(expected, rounded),
        effect=effect,
        dtype=dtype,
        verdict=verdict,
    )


def require_mergeable(folder: Path) -> None:
    """Refuse a run whose adapter can't be merged into its base, before the base is loaded.

    Raises:
        ConfigError: The base is quantised by a method that can't be undone here, or the adapter
            adds a bias to a layer that has none.
    """
    config = read_trained_config(folder)
    source = find_base(config.model)
    quantization = base_quantization(read_config_json(source))
    if (
        quantization is not None
        and quantization.method not in BITSANDBYTES | DEQUANTIZED
    ):
        name = config.model.name_or_path
        reason = f"its base {name} is quantised ({quantization.method}), and can't be merged into"
        raise refusal(
            "RUN", folder, f"{reason}; serve base and adapter apart: vllm --enable-lora"
        )
    adapter = RunFolder(folder).adapter
    if not (read_json(adapter / ADAPTER_CONFIG) or {}).get("lora_bias"):
        return
    layer = _layer_without_bias(adapter, source, config.model)
    if layer is not None:
        reason = f"its adapter was trained with lora_bias, and the base's layer {layer} has no bias"
        advice = f"PeftModel.from_pretrained(BASE, {str(adapter)!r}) and finetune.generate use it"
        raise refusal(
            "RUN", folder, f"{reason}, so PEFT can't merge it; {advice} unmerged"
        )


def _layer_without_bias(
    adapter: Path, source: BaseSource, model: ModelSettings
) -> str | None:
    """Return a layer of the base that has no bias where the adapter has one; None: there is none.

    Args:
        adapter: the folder of an adapter that was trained with `lora_bias`.
        source: its base.
        model: how its base is loaded.
    """
    quiet_libraries()
    import_model_libraries()
    from finetune.model.loading import skeleton_of
    from finetune.model.published_names import ADAPTED, published_names

    published = read_published_config(source, model)
    skeleton = skeleton_of(text_model_config(published), model)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        weights: dict[str, None] = dict.fromkeys(file.keys())
    names = published_names(published, skeleton)
    if names is not None:
        weights = names.of_text_model(weights)
    modules = dict(skeleton.named_modules())
    for weight in sorted(weights):
        layer = weight.removeprefix(ADAPTED).removesuffix(LORA_BIAS)
        has_bias = weight.endswith(LORA_BIAS)
        # What the base does not have is refused when the adapter is loaded.
        if has_bias and layer in modules and modules[layer].bias is None:
            return layer
    return None


def _save(merged: "PreTrainedModel", run: TrainedRun, folder: Path) -> None:
    """Save the merged model, its tokenizer and its generation config, completely or not at all."""
    from transformers import GenerationConfig

    ends = Encoder(run.tokenizer, run.config.model.template_kwargs).ends
    generation_config = generation_config_with_ends(run.base, ends)
    # Saving checks the model's own one, and refuses those of many bases.
    merged.generation_config = GenerationConfig()
    with create_new_folder(folder) as draft:
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
