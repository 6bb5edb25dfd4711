"""Tokenised rows: encoded, cut, packed if asked for, and cached on disk."""

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.encoding import IGNORED, encode
from finetune.data.types import Row, fingerprint
from finetune.errors import refusal
from finetune.files.atomic import create_folder
from finetune.files.cache import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENCODING_VERSION = 3
"""Increased when the encoding changes, so that tokens cached by an earlier version are not used."""


def tokenize(
    split: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings
) -> "Dataset":
    """Tokenise rows, or load their tokens from the cache.

    Args:
        split: The name of the split, for messages.
        rows: Rows in the common form.
        tokenizer: The base's tokenizer.
        settings: `max_length`, to which rows are cut, and `packing`.

    Returns:
        `input_ids` and `labels` of each row (see `encode`); with packing, of each sequence, and the
        lengths of its rows as `seq_lengths`. Rows without a label within `max_length` are left
        out; `left_out_count` returns their number.

    Raises:
        ConfigError: No row has a label within `max_length`, or a row can't be encoded.
    """
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    if not rows:
        return Dataset.from_dict({"input_ids": [], "labels": []})
    folder = cache_folder() / "tokens" / _cache_key(rows, tokenizer, settings)
    if not folder.exists():
        dataset = _encode_all(split, rows, tokenizer, settings)
        with create_folder(folder) as draft:
            dataset.save_to_disk(str(draft))
    tokens = load_from_disk(str(folder))
    count = left_out_count(tokens)
    if count:
        log.info("data: left out %d %s rows with no answer within dataset.max_length", count, split)
    return tokens


def left_out_count(tokens: "Dataset") -> int:
    """Return how many rows `tokenize` left out because they have no label within `max_length`."""
    return int(tokens.info.description or 0)


def as_list(tokens: "Dataset") -> list[dict[str, Any]]:
    """Return tokenised rows as a list, the same object for all runs that use the same data set.

    Converting ten thousand rows takes a second, so the list is kept as long as the data set is.
    """
    if tokens not in _lists:
        _lists[tokens] = tokens.to_list()
    return _lists[tokens]


_lists: "WeakKeyDictionary[Dataset, list[dict[str, Any]]]" = WeakKeyDictionary()


def _cache_key(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings
) -> str:
    """A hash of everything that tokens depend on."""
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint(
        [
            ENCODING_VERSION,
            rows,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            special_tokens,
            settings.max_length,
            settings.packing,
        ]
    )


def _encode_all(
    split: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings
) -> "Dataset":
    """Encode rows, cut them to `max_length`, and pack them if `packing` is set."""
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in rows:
        ids, labels = encode(row, tokenizer)
        labels = labels[: settings.max_length]
        # No token predicts the first one, so its label counts for nothing.
        if any(label != IGNORED for label in labels[1:]):
            columns["input_ids"].append(ids[: settings.max_length])
            columns["labels"].append(labels)
    count = len(columns["labels"])
    if not count:
        reason = f"leaves no {split} row an answer's token to learn from"
        raise refusal("dataset.max_length", settings.max_length, reason)
    dataset = Dataset.from_dict(columns)
    if settings.packing:
        from trl import pack_dataset

        dataset = pack_dataset(dataset, settings.max_length)
    dataset.info.description = str(len(rows) - count)  # saved with the rows, for `left_out_count`
    return dataset
