"""Real instruction data with nothing to download: the running interpreter's own docstrings.

`What does math.gcd do in Python?` -> the docstring of `math.gcd`, for public functions and classes
of the standard modules below. The rows depend on the Python version alone: they are collected by a
bare interpreter, because libraries patch the standard library when they are imported (torch
replaces `inspect.getfile`).
"""

import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator

MODULES = """
argparse base64 bisect calendar cmath collections contextlib copy csv datetime decimal difflib
fractions functools glob gzip heapq inspect io itertools json keyword locale logging math operator
os.path pathlib pprint random re secrets shlex shutil statistics string struct subprocess tempfile
textwrap threading time traceback types unicodedata urllib.parse uuid zipfile zlib
""".split()


SHORTEST, LONGEST = 40, 200
"""Bounds of an answer, in characters.

Longer docstrings are reference manuals, shorter ones say nothing.
"""

FAMILY = "family"
"""The column that says which rows are variations of one docstring: `math.sin` and `math.cos`."""

FAMILY_LIKENESS = 0.5
"""Two docstrings are of one family if this share of their words (Jaccard index) is in both."""


def question_answer_pairs() -> list[dict[str, str]]:
    """Return all rows, each with a `prompt`, its `completion` and its `family`, by prompt."""
    bare_interpreter = [sys.executable, "-I", __file__]
    process = subprocess.run(bare_interpreter, capture_output=True, check=True)
    rows: list[dict[str, str]] = json.loads(process.stdout)
    return rows


def _collect() -> list[dict[str, str]]:
    """Collect the rows; the interpreter that calls this must have imported nothing else."""
    # Keyed by answer, so that a function that two modules export makes one row.
    question_of: dict[str, str] = {}
    for module_name in MODULES:
        for name, docstring in _docstrings(module_name):
            question_of.setdefault(docstring, f"What does {name} do in Python?")
    rows = [
        {"prompt": question, "completion": answer}
        for answer, question in question_of.items()
    ]
    rows.sort(key=lambda row: row["prompt"])
    for row, family in zip(rows, _families(rows), strict=True):
        row[FAMILY] = family
    return rows


def _families(rows: list[dict[str, str]]) -> list[str]:
    """Return each row's family, named by the prompt of its first row."""
    words = [_words(row) for row in rows]
    family_of = list(range(len(rows)))
    for later, earlier in itertools.combinations(reversed(range(len(rows))), 2):
        common = words[later] & words[earlier]
        if len(common) < FAMILY_LIKENESS * len(words[later] | words[earlier]):
            continue
        # A row that is like two families makes them one.
        joined = {family_of[later], family_of[earlier]}
        family_of = [
            min(joined) if number in joined else number for number in family_of
        ]
    return [rows[number]["prompt"] for number in family_of]


def _words(row: dict[str, str]) -> frozenset[str]:
    """Return the words of a row's answer, without numbers and the words of the row's own name."""
    in_prompt = set(_letters(row["prompt"]))
    return frozenset(
        word for word in _letters(row["completion"]) if word not in in_prompt
    )


def _letters(text: str) -> list[str]:
    return re.findall("[a-z]+", text.casefold())


def _docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """Yield the qualified name and the docstring, as one line, of public functions and classes."""
    module = importlib.import_module(module_name)
    for name in sorted(vars(module)):
        member = getattr(module, name)
        if (
            name.startswith("_")
            or not callable(member)
            or not isinstance(member.__doc__, str)
        ):
            continue
        paragraphs = inspect.cleandoc(member.__doc__).split("\n\n")
        if paragraphs[0].startswith(f"{name}(") and len(paragraphs) > 1:
            del paragraphs[0]  # the signature that functions written in C carry on top
        docstring = " ".join(" ".join(paragraphs).split())
        if SHORTEST <= len(docstring) <= LONGEST:
            yield f"{module_name}.{name}", docstring


if __name__ == "__main__":
    json.dump(_collect(), sys.stdout)
