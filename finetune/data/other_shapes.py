"""Rows that hold no answers to learn, or say that an answer is good or bad; they are refused."""

from collections.abc import Collection
from typing import Any

from finetune.data.types import RawRow
from finetune.errors import ConfigError

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
SCORES = ("score", "reward", "rating")
FLAGS = ("label", "kto_tag")
ANSWER_LISTS = ("completions", "responses", "answers")
PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem")


def describe_shape(row: RawRow) -> str | None:
    """Return what rows are whose columns no format has, None if that is not known."""
    columns = {column for column, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= columns:
        columns_key = "dataset.columns={prompt: …, completion: chosen}"
        if isinstance(row["chosen"], list) and "prompt" not in columns:
            columns_key = "dataset.columns={messages: chosen}"
        instead = f"{columns_key} learns the chosen answers"
        return f"preference rows (chosen, rejected) are not learnt; {instead}"
    if "input_ids" in columns:
        return "rows that are tokenised already (input_ids) are not read; the text is needed"
    marks = columns & {"labels", "scores", "rewards", "ratings"}
    if columns & {*ANSWER_LISTS} and marks:
        name = sorted(marks)[0]
        return (
            f"scored answers ({name}) are not learnt; a row holds one answer to learn"
        )
    if columns & {*PROMPTS} and len(columns & {*PROMPTS}) == len(columns):
        return "prompts without answers (unlabeled rows) can't be learnt"
    return None


def refuse_marked(
    row: RawRow,
    used: Collection[str],
    answered: bool,
    where: str,
) -> None:
    """Refuse a row whose answer is marked as good or bad.

    Args:
        row: The row, without ignored columns.
        used: The columns that its format uses.
        answered: Whether the row is a chat that ends with an answer.
        where: The row's place, to begin error messages with.

    Raises:
        ConfigError: A column that the format does not use holds such a value.
    """
    values = {column: value for column, value in row.items() if column not in used}
    if values.get("rejected") is not None and not answered and "chosen" in row:
        raise _refuse("rejected", "this is a preference row (chosen, rejected)", where)
    for column in FLAGS:
        if _is_flag(values.get(column)):
            raise _refuse(column, "it marks the answer as good or bad (KTO)", where)
    for column in SCORES:
        if _is_number(values.get(column)):
            raise _refuse(column, "it is a score of the answer", where)


def refuse_media(row: RawRow, used: Collection[str], where: str) -> None:
    """Refuse a row that holds images, audio or video beside its text.

    Args:
        row: The row, without ignored columns.
        used: The columns that its format uses.
        where: The row's place, to begin error messages with.

    Raises:
        ConfigError: A column of that name holds a value.
    """
    for column in MEDIA:
        if column not in used and row.get(column):
            raise _refuse(column, "only text can be learnt", where)


def _refuse(column: str, reason: str, where: str) -> ConfigError:
    instead = f"dataset.ignore=[{column}] learns the row without it"
    return ConfigError(f"{where} has the column '{column}': {reason}; {instead}")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or str(value).lower() in ("true", "false")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
