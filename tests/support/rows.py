"""Rows of data sets, and the files that hold them."""

import csv
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import DatasetSettings
from finetune.data import tokens, types
from finetune.data.row_file import RowWriter, StoredRows
from finetune.data.token_file import Tokens

Row = dict[str, Any]
Settings = Callable[..., DatasetSettings]


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a config, as a run loads it."""
    from finetune.model import tokenizer
    from finetune.model.source import find_base

    return tokenizer.load_tokenizer(find_base(config.model), config.model)


def store_rows(rows: Iterable[Row]) -> StoredRows:
    """Rows in the common form as they are on disk; without a place they are counted from 1."""
    folder = Path(tempfile.mkdtemp())
    with RowWriter(folder) as writer:
        for number, row in enumerate(rows, start=1):
            is_placed = isinstance(row, types.Row)
            writer.append(row if is_placed else types.Row(row, "rows", number))
    return StoredRows.all_of(folder, len(writer))


def tokenize(
    split: str,
    rows: Iterable[Row],
    tokenizer: Any,
    settings: DatasetSettings,
    variables: dict[str, Any] | None = None,
) -> Tokens:
    """Rows in the common form, stored and tokenised."""
    stored_rows = store_rows(rows)
    return tokens.tokenize(split, stored_rows, tokenizer, settings, variables)


def texts(count: int, word: str = "row") -> list[Row]:
    """Different rows of plain text."""
    return [{"text": f"{word} number {index}"} for index in range(count)]


def chat(*contents: str) -> Row:
    """A chat row; the user begins."""
    return {
        "messages": [
            {"role": ("user", "assistant")[n % 2], "content": text}
            for n, text in enumerate(contents)
        ]
    }


def asked(question: str, answer: str) -> list[Row]:
    """What every format of the same question and answer becomes."""
    return [chat(question, answer)]


def marks(rows: Iterable[Row]) -> set[str]:
    """Rows as a set."""
    return {json.dumps(row, sort_keys=True) for row in rows}


def write_json_list(file: Path, rows: list[Row]) -> Path:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def write_csv(file: Path, rows: list[Row]) -> Path:
    with open(file, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: list[Row]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


Q, A = "How many?", "Four."
CHATS = [
    chat("What is 1 + 1?", "2"),
    chat("Say hello.", " Hello,\n\nworld — “ünïcode” ✓ "),
    chat(
        "What does math.gcd do in Python?",
        "Greatest Common Divisor of two integers, and of many more than two.",
    ),
    chat("A long question, " * 12, "A short answer."),
    chat("A short question?", "a long answer " * 20),
    chat(Q, "It ends with <|im_end|> inside."),
]
MANY_TURNS = chat(
    "What is 1 + 1?", "Two.", "And 2 + 2?", "Four!", "Thanks", "You are welcome."
)
