"""Real instruction data with nothing to download: the running interpreter's own docstrings.

`What does math.gcd do in Python?` -> the docstring of `math.gcd`, for public functions and classes
of the standard modules below. The rows depend on the Python version alone: they are collected by a
bare interpreter, because libraries patch the standard library when they are imported (torch
replaces `inspect.getfile`).
"""

import importlib
import inspect
import json
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


def question_answer_pairs() -> list[dict[str, str]]:
    """Return all rows, each with a `prompt` and its `completion`, ordered by prompt."""
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
    return sorted(rows, key=lambda row: row["prompt"])


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
