"""Rows as tokens: `input_ids` and `labels`, cached, and the order in which a run visits them."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.config import ConfigError, DatasetSettings, refusal
from finetune.data import Messages, Row, fingerprint
from finetune.hub import cache_folder, drafted

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that the loss leaves out."""

ENCODING = 3
"""Counted up when tokenisation changes, so that no cached rows of the old kind are used."""


def tokenize(part: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings) -> "Dataset":
    """`input_ids` and `labels` of each row (with packing: of each sequence, and its rows' `seq_lengths`), cached.

    Labels equal the ids where the loss counts and are -100 elsewhere: of chats the assistant's tokens count,
    the end-of-turn token among them, as with TRL's prompt and completion columns; of plain text all do. Rows
    are cut to `max_length` tokens, and left out if no label remains; `left_out` tells how many.
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
        with drafted(place) as draft:
            dataset.save_to_disk(str(draft))
    tokens = load_from_disk(str(place))
    if left_out(tokens):
        log.info("data: left out %d %s rows with no answer within dataset.max_length", left_out(tokens), part)
    return tokens


def listed(tokens: "Dataset") -> list[dict[str, Any]]:
    """The rows as lists, the same ones for all runs that have them: of ten thousand rows they take a second to make."""
    if tokens not in _listed:
        _listed[tokens] = tokens.to_list()
    return _listed[tokens]


_listed: "WeakKeyDictionary[Dataset, list[dict[str, Any]]]" = WeakKeyDictionary()


def left_out(tokens: "Dataset") -> int:
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


def epoch_order(lengths: Sequence[int], batch_rows: int, seed: int, epoch: int, group_by_length: bool) -> list[int]:
    """The order in which an epoch visits the rows: the same for every engine, whatever else draws random numbers.

    Grouped by length, rows are shuffled, sorted within stretches of 50 batches, and the longest batch comes
    first, as in transformers' `LengthGroupedSampler`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if group_by_length:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        order: list[int] = get_length_grouped_indices(list(lengths), batch_rows, generator=generator)
        return order
    return [int(index) for index in torch.randperm(len(lengths), generator=generator)]
