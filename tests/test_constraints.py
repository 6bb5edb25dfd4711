"""The versions of constraints.txt are there for every Python that pyproject.toml allows."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent


def pinned_packages() -> list[str]:
    """The packages of constraints.txt that are installed here."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [match[1] for line in lines if (match := re.match(r"([\w.-]+)==", line))]
    installed = {
        re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        for distribution in importlib.metadata.distributions()
    }
    return [name for name in names if re.sub(r"[-_.]+", "-", name).lower() in installed]


def test_most_pinned_packages_are_checked_here() -> None:
    assert len(pinned_packages()) > 100


@pytest.mark.parametrize("name", pinned_packages())
def test_a_pinned_version_runs_on_the_oldest_python(name: str) -> None:
    """A version that wants a later patch of it is not found there, and pip gives up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    required = importlib.metadata.metadata(name).get("Requires-Python") or ""
    assert SpecifierSet(required).contains(oldest), required
