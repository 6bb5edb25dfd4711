"""The text of an answer while its tokens are generated.

Loads no torch when it is imported, because a command imports it at its top.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""Stands for the first bytes of a character whose other bytes are in the next token."""


class TextStream:
    """Shows a text as far as further tokens can't change it; as a whole, it is the answer's text.

    Each piece is decoded with the one before it, because many tokenizers drop the space at the
    beginning of a text. So the time for a token does not grow with the text.

    Args:
        tokenizer: Decodes the tokens.
        show: Receives each further piece of the text.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", show: Callable[[str], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._preceding: list[int] = []
        self._waiting: list[int] = []
        self._text = ""
        self._shown = ""

    def add(self, tokens: list[int]) -> None:
        """Add new tokens of the answer."""
        self._waiting += tokens
        before = self._decode(self._preceding)
        text = self._decode(self._preceding + self._waiting)
        if text.endswith(INCOMPLETE) or not text.startswith(before):
            return
        self._text += text[len(before) :]
        self._preceding, self._waiting = self._waiting, []
        # Answers are without white space at both ends.
        self._show_until(self._text.strip())

    def finish(self, answer: str) -> None:
        """Show the rest of an answer that is complete."""
        if not answer.startswith(self._shown):
            # Decoded as a whole it differs, so the whole answer stands on a new line.
            self._show("\n")
            self._shown = ""
        self._show_until(answer)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _show_until(self, text: str) -> None:
        self._show(text[len(self._shown) :])
        self._shown = text
