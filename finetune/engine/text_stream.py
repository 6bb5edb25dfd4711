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

    Args:
        tokenizer: Decodes the tokens.
        show: Receives each further piece of the text.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", show: Callable[[str], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, tokens: list[int]) -> None:
        """Add new tokens of the answer."""
        self._tokens += tokens
        decoded = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # Answers are without white space at both ends.
        text = str(decoded).strip()
        if not text.endswith(INCOMPLETE):
            self._show_until(text)

    def finish(self, answer: str) -> None:
        """Show the rest of an answer that is complete."""
        self._show_until(answer)

    def _show_until(self, text: str) -> None:
        if text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
