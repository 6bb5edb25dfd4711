"""Kernels run in Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
from support.interpreter import leave_overflow_unchecked, patch_language_once

KERNEL_TESTS = {"test_kernels", "test_delta_rule"}
"""They compute each kernel alone, and check its integers for overflow, for all other tests."""


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        if "TRITON_INTERPRET" in os.environ:
            patch_language_once(patched)
        yield


@pytest.fixture(scope="module", autouse=True)
def _checked_overflow(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        is_kernel_test = request.path.stem in KERNEL_TESTS
        if "TRITON_INTERPRET" in os.environ and not is_kernel_test:
            leave_overflow_unchecked(patched)
        yield
