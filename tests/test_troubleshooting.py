"""docs/troubleshooting.md quotes lines that the program really prints."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = {"syntax error near unexpected token", "no matches found"}
"""Lines of other programs."""


def quoted_fragments() -> list[str]:
    """The constant pieces of the messages in the page's headings."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### .*$", text, re.MULTILINE)
    quotes = [
        quote for heading in headings for quote in re.findall(r"`([^`]+)`", heading)
    ]
    pieces = [piece.strip() for quote in quotes for piece in quote.split("…")]
    return [piece for piece in pieces if piece and piece not in FOREIGN]


@functools.cache
def program_texts() -> str:
    """All string constants of both packages, one on each line."""
    texts = []
    for package in ("finetune", "sweeps"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
            texts += [value for value in constants if isinstance(value, str)]
    return re.sub(r"%[ds]", "\n", "\n".join(texts))


@pytest.mark.parametrize("fragment", quoted_fragments())
def test_a_quoted_line_is_one_that_the_program_prints(fragment: str) -> None:
    assert fragment in program_texts()
