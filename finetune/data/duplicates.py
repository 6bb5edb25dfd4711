"""Rows that belong together: the same question, the same long answer, near twins, the same group.

Such rows never stand both in training and among the held-out rows.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from finetune.data.near_twins import MINIMUM_WORDS, PhraseIndex, common_limit
from finetune.data.types import Row
from finetune.data.wording import ANSWER_WORDS, join_words, wording, words

_WHOLE, _QUESTION, _ANSWER = range(3)

MAXIMUM_REPETITIONS = 20
"""A question or an answer of more rows, if these are more than a tenth of all, is an instruction or
a label, and ties nothing together."""


@dataclass(frozen=True)
class Ties:
    """Which rows belong together, by their numbers.

    Every pair of rows that belong together stands in a tie; a row may stand in several.
    """

    ties: list[list[int]]
    """The numbers in each tie ascend."""
    common_texts: int
    """Questions and answers of so many rows that they tie nothing together."""
    comparisons: int
    """How often two texts were compared."""

    def groups(self, count: int) -> "array[int]":
        """Return for each of the first `count` rows the first row of its group.

        Rows that are tied, directly or through other of these rows, are a group.
        """
        parents = array("q", range(count))
        for tie in self.ties:
            members = [number for number in tie if number < count]
            for number in members[1:]:
                first, second = sorted((_root(parents, members[0]), _root(parents, number)))
                parents[second] = first
        return array("q", (_root(parents, number) for number in range(count)))


def find_ties(rows: Sequence[Row], groups: Sequence[str | None]) -> Ties:
    """Find the rows that belong together.

    Time and memory grow linearly with the rows.

    Args:
        rows: The rows in the common form.
        groups: The value of `dataset.group_by` of each row; None: the row belongs to no group.
    """
    keys, key_rows, kinds = array("Q"), array("q"), array("B")
    text_rows, text_keys = array("q"), array("Q")
    index = PhraseIndex(len(rows), kinds=2)
    for number, row in enumerate(rows):
        texts = wording(row)
        question, last_answer = words(texts.question), words(texts.last_answer)
        question_key = _key(_QUESTION, question)
        answer_key = _key(_ANSWER, last_answer)
        row_keys = {(_hash(f"{question_key} {answer_key}"), _WHOLE)}
        if question:
            row_keys.add((question_key, _QUESTION))
        for answer in texts.answers:
            answer_words = last_answer if answer == texts.last_answer else words(answer)
            if len(answer_words) >= ANSWER_WORDS:
                row_keys.add((_key(_ANSWER, answer_words), _ANSWER))
        for key, kind in sorted(row_keys):
            keys.append(key)
            key_rows.append(number)
            kinds.append(kind)
        for key, kind, text_words in (
            (question_key, _QUESTION, question),
            (answer_key, _ANSWER, last_answer),
        ):
            if len(text_words) >= MINIMUM_WORDS:
                index.add(kind, text_words)
                text_rows.append(number)
                text_keys.append(key)
    common_texts = 0
    limit = common_limit(max(MAXIMUM_REPETITIONS, len(rows) // 10), len(rows))
    ties: list[list[int]] = []
    for kind, members in _runs(keys, key_rows, kinds):
        if kind != _WHOLE and len(members) > limit:
            common_texts += 1
        else:
            ties.append(members)
    for first, second in index.near_twins(text_keys):
        tie = sorted({text_rows[first], text_rows[second]})
        if len(tie) == 2:
            ties.append(tie)
    ties += _grouped(groups)
    return Ties(ties, common_texts, index.comparisons)


def _grouped(groups: Iterable[str | None]) -> list[list[int]]:
    """The numbers of the rows with the same value, where there are several."""
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(number)
    return [numbers for numbers in members.values() if len(numbers) > 1]


def _runs(
    keys: "array[int]", rows: "array[int]", kinds: "array[int]"
) -> Iterator[tuple[int, list[int]]]:
    """Yield the kind and the rows of each key that several rows have."""
    import numpy as np

    if not keys:
        return
    key_numbers = np.frombuffer(keys, np.uint64)
    order = np.argsort(key_numbers, kind="stable")
    sorted_keys = key_numbers[order]
    starts = np.flatnonzero(np.append(True, sorted_keys[1:] != sorted_keys[:-1]))
    ends = np.append(starts[1:], len(sorted_keys))
    for run in np.flatnonzero(ends - starts > 1):
        entries = order[starts[run] : ends[run]]
        yield kinds[entries[0]], [rows[entry] for entry in entries]


def _key(kind: int, text_words: list[str]) -> int:
    """A hash of a text of a kind: no question equals an answer."""
    return _hash(f"{kind} {join_words(text_words)}")


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest)


def _root(parents: "array[int]", number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
