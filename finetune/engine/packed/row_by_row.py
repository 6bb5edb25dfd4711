"""Layers with a state that runs through a sequence, computed for each row of a packed batch alone.

Attention keeps rows apart by itself. A short convolution or a recurrence (LFM2, Qwen 3.5, Mamba)
would go on from one row into the next.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

RowCall = Callable[..., Any]
"""Calls a layer with the arguments of one row."""


def recurrent_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a decoder whose state runs through a sequence.

    All of transformers' recurrent layers begin with a convolution over time, which they own.
    """
    layers = []
    for module in model.modules():
        children = module.children()
        if any(isinstance(child, torch.nn.Conv1d) for child in children):
            layers.append(module)
    return layers


def call_row_by_row(
    call: RowCall,
    bounds: Sequence[tuple[int, int]],
    arguments: tuple[Any, ...],
    named_arguments: dict[str, Any],
) -> Any:
    """Call a layer for each row, and join the outputs.

    Args:
        call: Gets the number of the row, and the layer's arguments for it.
        bounds: First token of each row, and one past its last.
        arguments: The layer's arguments for all rows; tensors are [1, tokens, …].
        named_arguments: The same by name.

    Returns:
        The layer's output for all rows; of a tuple, tensors are joined.
    """
    tokens = bounds[-1][1]
    outputs = []
    for number, (start, stop) in enumerate(bounds):

        def of_row(value: Any, start: int = start, stop: int = stop) -> Any:
            return _of_row(value, tokens, start, stop)

        row_arguments = [of_row(value) for value in arguments]
        named = {name: of_row(value) for name, value in named_arguments.items()}
        outputs.append(call(number, *row_arguments, **named))
    return _join(outputs)


def _of_row(value: Any, tokens: int, start: int, stop: int) -> Any:
    """An argument's part for one row: tensors with the batch's tokens are cut."""
    if isinstance(value, tuple):
        return tuple(_of_row(item, tokens, start, stop) for item in value)
    is_tensor = isinstance(value, torch.Tensor) and value.dim() >= 2
    if is_tensor and value.shape[1] == tokens:
        return value[:, start:stop]
    return value


def _join(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs), 1)
    if isinstance(first, tuple):
        return tuple(_join(items) for items in zip(*outputs, strict=True))
    return first
