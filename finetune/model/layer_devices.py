"""Where the layers of a base are: on one device, or spread over several GPUs."""

from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def count_stages(base: "PreTrainedModel") -> int:
    """Return how many devices hold weights of a base."""
    return len({weight.device for weight in base.parameters()})


def block_devices(decoder: Any) -> list[torch.device]:
    """Return the device of each block of a transformers decoder."""
    return [next(block.parameters()).device for block in decoder.layers]


def layer_device(base: "PreTrainedModel", name: str) -> torch.device:
    """Return the device of a linear layer of a base."""
    device: torch.device = base.get_submodule(name).weight.device
    return device


def require_spreadable(shapes: "PreTrainedConfig", gpus: int) -> None:
    """Refuse a base whose blocks share more than their input and output.

    Args:
        shapes: The base's text config.
        gpus: Over how many GPUs it is to be spread.

    Raises:
        ConfigError: Its blocks share keys and values, or have per-layer inputs (Gemma 4).
    """
    shares_keys = getattr(shapes, "num_kv_shared_layers", None)
    if shares_keys or getattr(shapes, "hidden_size_per_layer_input", None):
        reason = f"the blocks of a base of type {shapes.model_type} share tensors; allowed: 1"
        raise refusal("trainer.gpus", gpus, reason)
