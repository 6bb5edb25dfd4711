"""Questions to show what a model has learnt, asked as the rows ask theirs."""

from finetune.data.types import Prompt, Row


def first_prompt(row: Row) -> Prompt | None:
    """Return the first question of a row with its system turn and tools, None for plain text."""
    for message in row.get("messages", ()):
        if message["role"] == "user":
            return Prompt(str(message["content"]), system_of(row), row.get("tools"))
    return None


def first_answer(row: Row) -> str | None:
    """Return the answer to a row's first question, None if the row has none in words."""
    messages = iter(row.get("messages", ()))
    for message in messages:
        if message["role"] == "user":
            break
    answer = next(messages, None)
    if answer is None or answer["role"] != "assistant":
        return None
    content = answer.get("content")
    return str(content) if content else None


def system_of(row: Row) -> str | None:
    """Return the system turn with which a chat begins."""
    messages = row.get("messages")
    if messages and messages[0]["role"] == "system":
        return str(messages[0]["content"])
    return None
