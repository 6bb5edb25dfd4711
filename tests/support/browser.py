"""A headless Chromium of the system's, and what a person would see in it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start the browser for the block."""
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


def screenshot(page: Any, name: str) -> None:
    """Keep what a person would see, where CI wants it."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
