"""The keys that docs/json.md describes."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"


def described_keys(document: str) -> set[str]:
    """The keys in the table of a document, as STUDY or PLAN."""
    text = PAGE.read_text()
    (section,) = re.findall(rf"\n{document}[,:].*?\n\n(.*?)\n\n", text, re.DOTALL)
    keys = [row.split("|")[1] for row in section.splitlines()[2:]]
    return set(re.findall(r"`(\w+)`", " ".join(keys)))
