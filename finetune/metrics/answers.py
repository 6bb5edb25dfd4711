"""The answers of rows that are generated, each with its prompt and its reference."""

from collections.abc import Iterator, Sequence

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.data.messages import is_answer
from finetune.data.types import Message, Prompt, Row
from finetune.metrics.metric import Answer
from finetune.metrics.reasoning import without_reasoning
from finetune.metrics.tool_calls import calls_text


def answers_of(rows: Sequence[Row], settings: EvaluationSettings) -> list[Answer]:
    """Return the answers to be generated, in the order of the rows.

    Args:
        rows: Rows in the common form. Plain text has no answer.
        settings: `limit` and `turns`.
    """
    answers: list[Answer] = []
    # One by one, because rows are read from disk and a limit needs only the first ones.
    for position in range(min(len(rows), settings.limit or len(rows))):
        row = rows[position]
        of_row = list(_answers_of_row(row, position))
        answers += of_row if settings.turns == "all" else of_row[-1:]
    return answers


def _answers_of_row(row: Row, position: int) -> Iterator[Answer]:
    messages = row.get("messages", [])
    for turn, message in enumerate(messages):
        # An answer that nothing precedes has no prompt.
        if turn == 0 or not is_answer(message):
            continue
        before = messages[:turn]
        prompt = Prompt(
            str(before[-1]["content"]), tools=row.get("tools"), messages=before
        )
        yield Answer(row, position, prompt, _reference(message))


def _reference(message: Message) -> str:
    """The text of a row's answer; tool calls are JSON after it."""
    text = without_reasoning(str(message["content"]))
    if "tool_calls" not in message:
        return text
    return f"{text}\n{calls_text(message['tool_calls'])}".strip()
