"""A browser for the tests of report pages."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import CHROMIUM


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    if CHROMIUM is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = [
        "--no-sandbox",
        *(
            f"--disable-{what}"
            for what in ("gpu", "background-networking", "component-update")
        ),
    ]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=quiet, timeout=120_000
        )
        yield opened
        opened.close()
