"""The GPU kernels, on a CPU by Triton's interpreter."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    pass


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The module, interpreted (conftest.py)."""
    from finetune.engine.packed.gpu import kernels

    return kernels
