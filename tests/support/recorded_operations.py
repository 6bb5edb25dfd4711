"""CUDA graphs for a CPU: operations are recorded, and computed again on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = (
    "tolist",
    "item",
    "numpy",
    "cpu",
    "nonzero",
    "__bool__",
    "__int__",
    "__index__",
)
"""What waits for a GPU: while it records that is an error."""


class _NoWaiting(TorchFunctionMode):
    """Refuses to wait for a result."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function.__name__ in WAITING:
            raise RuntimeError(f"{function.__name__}: not permitted while recording")
        return function(*arguments, **(keywords or {}))


class _Recording(TorchDispatchMode):
    """Notes each operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = operation(*arguments, **(keywords or {}))
        self.operations.append((operation, arguments, keywords or {}, result))
        return result


def record_operations(launch: Callable[[], None]) -> Callable[[], None]:
    """Record the operations of a function.

    Returns:
        Computes them again: Python's numbers are those of the recording, tensors are read anew.
    """
    with _NoWaiting(), _Recording() as recording:
        launch()

    def replay() -> None:
        for operation, arguments, keywords, result in recording.operations:
            again = operation(*arguments, **keywords)
            inputs = {_memory(tensor) for tensor in _tensors((arguments, keywords))}
            for recorded, computed in zip(
                _tensors(result), _tensors(again), strict=True
            ):
                # Views, and what was computed in place, have the memory of an argument.
                if _memory(recorded) not in inputs:
                    recorded.copy_(computed)

    return replay


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
