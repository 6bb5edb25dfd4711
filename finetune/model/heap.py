"""The C library's heap, whose gaps would add a third to the memory of a run on a CPU.

glibc keeps freed memory for later allocations. Before version 2.38 an aligned one, as those of
PyTorch, does not fit into a gap of its own size: what a layer computes and frees stays beside what
the next layer takes.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TRIMMED_LAYERS = 4
"""Layers after which the heap is trimmed: more often costs time, less often memory."""

LARGE_STATES = 4 * 2**20
"""Bytes of a layer's input from which gaps are worth the time. Of SmolLM2 with 900 tokens (2 MB),
trimming between layers saved 1 % of the memory and cost up to 7 % of the time."""

LARGE_STATES_8BIT = 2**20
"""The same for a base in 8 bits, whose products take copies of their inputs: of SmolLM2 with 900
tokens the gaps were a sixth of the memory."""


def trim_heap() -> None:
    """Return freed memory to the system."""
    # Other C libraries lack the function.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def trimmed_heap(decoder: "torch.nn.Module") -> Iterator[None]:
    """Trim the heap while a decoder computes a large batch, and after any batch.

    Does nothing on a GPU, whose memory PyTorch manages itself.

    Args:
        decoder: A base without its head. Its layers are the children of its first `ModuleList`.
    """
    # `finetune.model.memory` imports this module, and is imported before torch is needed.
    import torch

    from finetune.model.device import on_gpu

    if on_gpu():
        yield
        return
    lists = (
        part for part in decoder.children() if isinstance(part, torch.nn.ModuleList)
    )
    layers = next(lists, torch.nn.ModuleList())
    is_8bit = any(type(part).__name__ == "Linear8bitLt" for part in layers.modules())
    large = LARGE_STATES_8BIT if is_8bit else LARGE_STATES

    def trim_if_large(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].nbytes >= large:
            trim_heap()

    hooks = [decoder.register_forward_hook(lambda *_: trim_heap())]
    for layer in layers[::TRIMMED_LAYERS]:
        hooks.append(layer.register_forward_pre_hook(trim_if_large))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
