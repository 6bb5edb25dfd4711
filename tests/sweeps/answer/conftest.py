"""Fixtures of the report's tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    with open_browser() as opened:
        yield opened
