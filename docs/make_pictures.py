"""The pictures of docs/reports.md, from a real study's report.

    python docs/make_pictures.py [STUDY_FOLDER]

Without a folder the default study is run first, which takes minutes. Needs Chromium (apt-get
install chromium) and Playwright, which the extra `dev` has.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PICTURES = {
    "report-answer": ("#answer", "#leaderboard"),
    "report-charts": ("#curves", "#importance"),
}
"""Name of each screenshot, and the first and last section that it shows."""

WIDTH = 1180


def main() -> None:
    """Make all screenshots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", type=Path)
    study: Path | None = parser.parse_args().study
    with tempfile.TemporaryDirectory() as folder:
        draw(study or default_study(Path(folder)), Path(__file__).parent / "pictures")


def default_study(folder: Path) -> Path:
    """Run the default study in a folder."""
    command = [
        sys.executable,
        "-m",
        "finetune",
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.study_name=default",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "outputs" / "sweeps" / "default"


def draw(study: Path, pictures: Path) -> None:
    """Take a screenshot of each picture's sections."""
    from playwright.sync_api import sync_playwright

    pictures.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto((study / "report.html").absolute().as_uri())
        for name, (first, last) in PICTURES.items():
            top, end = box(page, first), box(page, last)
            start = 0 if first == "#answer" else top["y"] - 12
            clip = {
                "x": 0,
                "y": start,
                "width": WIDTH,
                "height": end["y"] + end["height"] + 12 - start,
            }
            page.screenshot(
                path=str(pictures / f"{name}.png"), clip=clip, full_page=True
            )
        browser.close()


def box(page: Any, selector: str) -> dict[str, float]:
    """Return the position and size of a section on the page, in pixels."""
    bounding_box: dict[str, float] = page.locator(selector).bounding_box()
    return bounding_box


if __name__ == "__main__":
    main()
