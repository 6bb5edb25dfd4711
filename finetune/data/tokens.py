"""Rows of several runs laid end to end: one line of tokens without padding, in which each row sees itself alone.

What the rows of one batch begin with alike (a system prompt) is laid once, and all of them attend to it.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.config.schema import DatasetSettings
from finetune.data.types import Messages, Row, fingerprint
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import create_folder
from finetune.files.cache import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


WORTH_SHARING = 8
"""Tokens that rows must have in common at their beginning, before they are computed apart from the rest."""


def common_prefix_length(rows: Sequence[dict[str, Any]]) -> int:
    """How many tokens all rows begin with, up to the one that predicts the first answer's token; 0: too few.

    Nothing is shared by a single row, or by sequences that hold several.
    """
    if len(rows) < 2 or "seq_lengths" in rows[0]:
        return 0
    first, last = (edge([row["input_ids"] for row in rows]) for edge in (min, max))
    pairs = enumerate(zip(first, last, strict=False))
    alike = next((index for index, (one, other) in pairs if one != other), len(first))
    labels = (next(index for index, label in enumerate(row["labels"]) if label != IGNORED) for row in rows)
    shared = min(alike, min(labels) - 1, len(first) - 1)
    return shared if shared >= WORTH_SHARING else 0


def computed_length(row: dict[str, Any]) -> int:
    """How many of a row's tokens are computed: up to the one that predicts the last answer's last token."""
    labels = row["labels"]
    return next((index for index in reversed(range(1, len(labels))) if labels[index] != IGNORED), 1)


log = logging.getLogger(__name__)


IGNORED = -100
"""The label of a token that the loss leaves out."""


ENCODING = 3
"""Counted up when tokenisation changes, so that no cached rows of the old kind are used."""


def tokenize(part: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings) -> "Dataset":
    """`input_ids` and `labels` of each row (with packing: of each sequence, and its rows' `seq_lengths`), cached.

    Labels equal the ids where the loss counts and are -100 elsewhere: of chats the assistant's tokens count,
    the end-of-turn token among them, as with TRL's prompt and completion columns; of plain text all do. Rows
    are cut to `max_length` tokens, and left out if no label remains; `left_out_count` tells how many.
    """
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    if not rows:
        return Dataset.from_dict({"input_ids": [], "labels": []})
    recipe = [
        ENCODING,
        rows,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        settings.max_length,
        settings.packing,
    ]
    place = cache_folder() / "tokens" / fingerprint(recipe)
    if not place.exists():
        encoded = [_encode(row, tokenizer) for row in rows]
        cut = [(ids[: settings.max_length], labels[: settings.max_length]) for ids, labels in encoded]
        kept = [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]
        if not kept:
            raise refusal(
                "dataset.max_length", settings.max_length, f"leaves no {part} row an answer's token to learn from"
            )
        dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]})
        if settings.packing:
            from trl import pack_dataset

            dataset = pack_dataset(dataset, settings.max_length)
        dataset.info.description = str(len(rows) - len(kept))  # kept with the rows, for `left_out`
        with create_folder(place) as draft:
            dataset.save_to_disk(str(draft))
    tokens = load_from_disk(str(place))
    if left_out_count(tokens):
        log.info("data: left out %d %s rows with no answer within dataset.max_length", left_out_count(tokens), part)
    return tokens


def as_list(tokens: "Dataset") -> list[dict[str, Any]]:
    """The rows as lists, the same ones for all runs that have them: of ten thousand rows they take a second to make."""
    if tokens not in _listed:
        _listed[tokens] = tokens.to_list()
    return _listed[tokens]


_listed: "WeakKeyDictionary[Dataset, list[dict[str, Any]]]" = WeakKeyDictionary()


def left_out_count(tokens: "Dataset") -> int:
    """How many rows `tokenize` left out, because no answer's token was within `max_length`."""
    return int(tokens.info.description or 0)


def _encode(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    if "text" in row:
        ids = tokenizer(_ended(row["text"], tokenizer))["input_ids"]
        return ids, list(ids)
    if tokenizer.chat_template is None:
        return _encode_plain(row["messages"], tokenizer)
    return _encode_chat(row["messages"], tokenizer)


def _encode_plain(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """One question and its answer for a base without a chat template: the answer follows the question's text.

    Where no white space parts the two, the answer begins on a new line, which is learnt as part of it.
    """
    if len(messages) != 2:
        raise ConfigError("model.chat_template=null: this tokenizer has none, and the chats have more than two turns")
    question, answer = (message["content"] for message in messages)
    glued = question and not question[-1].isspace() and not answer[0].isspace()
    prompt = tokenizer(question)["input_ids"]
    ids = tokenizer(_ended(question + ("\n" if glued else "") + answer, tokenizer))["input_ids"]
    start = _common_prefix(prompt, ids)
    return ids, [IGNORED] * start + ids[start:]


def _encode_chat(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """A chat by the tokenizer's template, labelled where the assistant speaks.

    An answer begins where the chat and the chat so far with a generation prompt diverge, and ends where the
    next turn begins. Templates that render an answer otherwise once it is history (they drop its reasoning)
    leave no such stretch for it: then only the last answer is learnt.
    """

    def render(turns: Messages, ask: bool = False) -> list[int]:
        return render_chat(tokenizer, turns, ask)

    ids = render(messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn > 0:
            prompt = render(messages[:turn], ask=True)
            start = _common_prefix(prompt, ids)
            if start < len(prompt):  # the template moved something: the answer begins where another one would differ
                other = [*messages[:turn], {**message, "content": "\0"}, *messages[turn + 1 :]]
                start = max(start, _common_prefix(render(other), ids))
            end = len(ids) if turn == len(messages) - 1 else _common_prefix(render(messages[: turn + 1]), ids)
            labels[start:end] = ids[start:end]
    return ids, labels


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages, ask: bool) -> list[int]:
    """A chat's tokens by the tokenizer's template, with a generation prompt if asked for.

    Raises ConfigError with the template's own words where it refuses a chat (some take no system text).
    """
    from jinja2 import TemplateError

    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"model.chat_template: can't render a chat of {roles}: {error}") from error
    return ids


def _ended(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text with the end token, so that generation learns to stop."""
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
