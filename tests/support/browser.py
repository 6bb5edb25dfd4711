"""A headless Chromium of the system's."""

import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)


def screenshot(page: Any, name: str) -> None:
    """Keep what a person would see, where CI wants it."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
