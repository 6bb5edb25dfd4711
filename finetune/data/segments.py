"""Examples as text, for people: each token's text, and whether it is trained or cut."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from finetune.data.encoding import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""

MOST_PARTS = 8
"""Tokens that may share one character; after as many, the bytes are no text."""


class Kind(NamedTuple):
    """What becomes of a token."""

    trained: bool
    """The loss counts it."""
    cut: bool
    """It stands beyond `dataset.max_length`."""
    special: bool
    """It is a token of the chat template or of the tokenizer, as `<|im_end|>`."""


@dataclass(frozen=True)
class Token:
    """A token of an example."""

    text: str
    id: int
    kind: Kind


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of the same kind."""

    text: str
    kind: Kind


def tokens_of(
    example: Encoded, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> list[Token]:
    """Return all tokens of an example, the cut ones too.

    Together their texts are the example's. Where several tokens share a character, the last of
    them has it, and the others are empty.

    Args:
        example: An encoded row, of any length.
        tokenizer: The tokenizer that encoded it.
        max_length: `dataset.max_length`.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    length = len(example.ids) if max_length is None else max_length
    tokens = []
    texts = _texts(example.ids, tokenizer)
    for index, (text, token) in enumerate(zip(texts, example.ids, strict=True)):
        is_cut = index >= length
        is_trained = example.labels[index] != IGNORED and not is_cut
        tokens.append(Token(text, token, Kind(is_trained, is_cut, token in special)))
    return tokens


def segments_of(tokens: Sequence[Token], special: bool = True) -> list[Segment]:
    """Join neighbouring tokens of the same kind.

    Args:
        tokens: The tokens of an example.
        special: Whether special tokens are a kind of their own.
    """

    def kind_of(token: Token) -> Kind:
        return token.kind if special else token.kind._replace(special=False)

    segments = []
    for kind, group in itertools.groupby(tokens, key=kind_of):
        segments.append(Segment("".join(token.text for token in group), kind))
    return segments


def _texts(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """The text of each token.

    Tokenizers decode a token otherwise at the beginning of a text (without its space), and a part
    of a character not at all. So a token's text is what it adds to that of the token before it.
    """

    def decode(first: int, end: int) -> str:
        text: str = tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)
        return text

    before = 0  # The first token of those that the pending ones are decoded with.
    pending = 0  # The first token whose text is not complete yet.
    for index in range(len(ids)):
        end = index + 1
        context = decode(before, pending)
        text = decode(before, end)
        is_part = (
            text.endswith(INCOMPLETE) and end - pending < MOST_PARTS and end < len(ids)
        )
        if is_part:
            yield ""
            continue
        yield text[len(context) :] if text.startswith(context) else decode(pending, end)
        before, pending = pending, end
