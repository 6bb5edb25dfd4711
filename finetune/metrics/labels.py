"""The labels of a classification, and the rows that have each label as their answer."""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.data.answers import common_length
from finetune.data.encoding import IGNORED, Encoded, Encoder
from finetune.data.lengths import first_label
from finetune.data.token_file import Example
from finetune.data.types import Row
from finetune.errors import ConfigError, refusal
from finetune.metrics.answers import answers_of, iterate_answers
from finetune.metrics.metric import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Labels = dict[str, str]
"""The labels in alphabetical order, each with the text that training rows have most often for it:
the label, perhaps with white space around it."""


def find_labels(rows: Sequence[Row], settings: EvaluationSettings) -> Labels:
    """Return the different answers of training rows.

    Args:
        rows: The training rows in the common form.
        settings: `turns` and `max_labels`.

    Raises:
        ConfigError: The answers are no small set. The message names a row.
    """
    texts: dict[str, Counter[str]] = {}
    count = 0
    for answer in iterate_answers(rows, len(rows), settings.turns):
        count += 1
        if answer.reference not in texts and len(texts) == settings.max_labels:
            number = f"has different answer number {settings.max_labels + 1}"
            allowed = f"evaluation.max_labels={settings.max_labels}"
            raise _refuse(f"{answer.row.place} {number}; allowed: {allowed}")
        text = _text_of(answer)
        texts.setdefault(answer.reference, Counter())[text] += 1
    if len(texts) < 2:
        raise _refuse("needs training rows with at least two different answers")
    if count < 2 * len(texts):
        numbers = f"{count} training rows with {len(texts)} different answers"
        raise _refuse(f"needs a small set of answers, not {numbers}")
    labels = {}
    for label, counts in sorted(texts.items()):
        # Of two texts that are as frequent, the first in alphabetical order.
        labels[label] = max(sorted(counts), key=counts.__getitem__)
    return labels


def _text_of(answer: Answer) -> str:
    """The text of an answer that is a label and nothing else."""
    message = answer.message
    text = str(message["content"])
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if message.get(key):
            raise _refuse(f"{answer.row.place}: its answer has {key} beside the label")
    if text.strip() != answer.reference:
        raise _refuse(f"{answer.row.place}: its answer has a think block")
    return text


def _refuse(reason: str) -> ConfigError:
    return refusal("evaluation.metrics", "classification", reason)


@dataclass(frozen=True)
class LabelledRows:
    """Rows to be classified."""

    answers: list[Answer]
    labels: Labels
    encoder: Encoder
    max_length: int | None
    """`dataset.max_length`."""

    @classmethod
    def create(
        cls,
        rows: Sequence[Row],
        labels: Labels,
        settings: EvaluationSettings,
        tokenizer: "PreTrainedTokenizerBase",
        variables: Mapping[str, Any] | None,
        max_length: int | None,
    ) -> "LabelledRows":
        """Collect the answers of rows.

        Args:
            rows: Rows in the common form.
            labels: From `find_labels`.
            settings: `limit` and `turns`.
            tokenizer: The base's tokenizer.
            variables: Variables of the chat template (`model.template_kwargs`).
            max_length: `dataset.max_length`.

        Raises:
            ConfigError: An answer is none of the labels. The message names its row.
        """
        answers = answers_of(rows, settings)
        for answer in answers:
            if answer.reference not in labels:
                reason = f"{answer.row.place}: its answer {answer.reference[:50]!r}"
                names = ", ".join(labels)
                raise _refuse(f"{reason} is none of the training rows': {names}")
        # Only the last answer: the chat before it is context.
        encoder = Encoder(tokenizer, variables, "last_answer")
        return cls(answers, labels, encoder, max_length)

    @functools.cached_property
    def candidates(self) -> "Candidates":
        """The tokenised rows of all labels of each answer, encoded when they are first needed."""
        candidates = Candidates(len(self.labels))
        for number, answer in enumerate(self.answers):
            encoded = self._encode(answer)
            if encoded is not None:
                candidates.add(number, encoded)
        unscored = len(self.answers) - len(candidates.answers)
        if unscored:
            log.warning(
                "%d of %d rows are not classified: with a label they have no place within "
                "dataset.max_length",
                unscored,
                len(self.answers),
            )
        return candidates

    def _encode(self, answer: Answer) -> list[Encoded] | None:
        """Encode an answer's chat with each label; None if a label is not within `max_length`."""
        rows = []
        for text in self.labels.values():
            chat = {
                "messages": [
                    *(answer.prompt.messages or []),
                    {"role": "assistant", "content": text},
                ],
                "tools": answer.prompt.tools,
            }
            examples = self.encoder.encode(chat).examples
            limit = self.max_length
            if not examples or (limit is not None and len(examples[-1].ids) > limit):
                return None
            rows.append(examples[-1])
        return rows


class Candidates(Sequence[Example]):
    """Tokenised rows: those of the first answer with each label, then those of the second.

    What the rows of an answer begin with alike, its prompt, is stored once.

    Args:
        label_count: The rows of each answer.
    """

    def __init__(self, label_count: int) -> None:
        self.label_count = label_count
        self.answers: list[int] = []
        """The numbers of the answers."""
        self._prompts: list[list[int]] = []
        self._ends: list[tuple[list[int], list[int]]] = []

    def add(self, number: int, rows: Sequence[Encoded]) -> None:
        """Add an answer's rows.

        Args:
            number: The answer's number.
            rows: One for each label.
        """
        sequences = [row.ids for row in rows]
        # What the first and the last in lexicographic order have in common, all have.
        shared = common_length(min(sequences), max(sequences))
        for row in rows:
            shared = min(shared, first_label(row.labels))
        self.answers.append(number)
        self._prompts.append(sequences[0][:shared])
        self._ends += [(row.ids[shared:], row.labels[shared:]) for row in rows]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        ids, labels = self._ends[index]
        prompt = self._prompts[index // self.label_count]
        return {
            "input_ids": prompt + ids,
            "labels": [IGNORED] * len(prompt) + labels,
        }
