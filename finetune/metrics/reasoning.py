"""What a model thinks before it answers, which no metric reads."""

import re

_BLOCK = re.compile(r"<think>.*?</think>", re.DOTALL)


def without_reasoning(text: str) -> str:
    """Return an answer without its think blocks, and without white space around it.

    A block may have begun in the prompt, or may never end within the limit of the answer's tokens.
    """
    text = _BLOCK.sub("", text)
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0].strip()
