"""README.md is short and leads to every page of docs/; links between the pages lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SETUP = "    python3 -m venv .venv && "
"""How the two set-up lines begin: they are one line each, to be pasted."""


def linked_files(page: Path) -> set[Path]:
    """The project's files that a page links to."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    return {
        (page.parent / target).resolve() for target in targets if "://" not in target
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = {file.name for file in linked_files(page) if not file.exists()}
    assert not missing


def test_the_readme_leads_to_every_page() -> None:
    assert set(PAGES[1:]) <= linked_files(ROOT / "README.md")


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [
        line for line in lines if len(line) > 100 and not line.startswith(SETUP)
    ] == []
