"""Kernels run in Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
from support.interpreter import patch_language_once


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        if "TRITON_INTERPRET" in os.environ:
            patch_language_once(patched)
        yield
