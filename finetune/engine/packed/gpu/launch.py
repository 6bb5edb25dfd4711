"""Launch Triton kernels without Triton's inspection of every argument at every launch."""

from typing import Any

import torch

from finetune.compat import compile_and_launch

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    stages: int = 3,
) -> None:
    """Launch a kernel on the device of its first argument, a tensor.

    Triton's own inspection of the arguments takes longer than a small kernel runs. Here it is done
    once for each combination of what Triton compiles for: dtypes, alignment to 16, ones, and
    integers of more than 31 bits.

    Args:
        kernel: A function compiled by `triton.jit`.
        grid: Number of programs in each dimension.
        arguments: Tensors, integers and floats.
        constants: The kernel's `tl.constexpr` arguments.
        warps: Warps of one program.
        stages: Stages of software pipelining.
    """
    device = arguments[0].device
    # Not on the first GPU, which is the current one: the layers of a base may be on several.
    if device.index:
        with torch.cuda.device(device):
            _launch(kernel, grid, arguments, constants, warps, stages)
    else:
        _launch(kernel, grid, arguments, constants, warps, stages)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> None:
    """Launch a kernel on the current device, which is that of the arguments."""
    # One expression without function calls of its own, because every launch waits for it.
    kinds = tuple(
        (argument.dtype, argument.data_ptr() % 16 == 0)
        if isinstance(argument, torch.Tensor)
        else (argument % 16 == 0, argument == 1, argument >> 31)
        for argument in arguments
        if not isinstance(argument, float)
    )
    # A compiled kernel belongs to its device.
    key = (kernel, arguments[0].device, kinds, constants, warps, stages)
    compiled = _compiled.get(key)
    # The first launch of a combination compiles; later ones skip Triton's Python code.
    if compiled is None:
        _compiled[key] = compile_and_launch(
            kernel, grid, arguments, constants, warps, stages
        )
    else:
        compiled[grid](*arguments, *constants)
