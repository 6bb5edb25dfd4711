"""Memory that a kernel has not written holds whatever is worst."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _unwritten_memory_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors of floats with their largest value, so that a kernel overflows that reads them."""
    import torch
    from torch.utils._device import _device_constructors

    # The first `torch.device("meta")` of the process remembers which functions it changes: with
    # the replacements below, weights would be made on the CPU in all tests that follow.
    _device_constructors()

    def filled(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            tensor = function(*args, **kwargs)
            if tensor.dtype.is_floating_point and tensor.device.type == "cpu":
                tensor.detach().fill_(torch.finfo(tensor.dtype).max)
            return tensor

        return make

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
