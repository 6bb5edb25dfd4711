"""Rows that belong together: the same question, the same long answer, near twins, the same group.

Such rows never stand both in training and among the held-out rows. This module finds them: `split`
keeps them together, `rows` leaves out those of held-out files.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from finetune.data.near_twins import MINIMUM_WORDS, PhraseIndex, common_limit
from finetune.data.types import Row
from finetune.data.wording import ANSWER_WORDS, Wording, join_words, wording, words

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
                first, second = sorted(
                    (_root(parents, members[0]), _root(parents, number))
                )
                parents[second] = first
        return array("q", (_root(parents, number) for number in range(count)))

    def tied_to(self, numbers: Iterable[int], start: int) -> set[int]:
        """Return the rows from `start` on that are tied directly to one of some earlier rows.

        Args:
            numbers: The earlier rows.
            start: The first row that is looked at.
        """
        is_earlier = bytearray(start)
        for number in numbers:
            is_earlier[number] = 1
        tied: set[int] = set()
        for tie in self.ties:
            if any(number < start and is_earlier[number] for number in tie):
                tied.update(number for number in tie if number >= start)
        return tied


def find_ties(rows: Iterable[Row], groups: Sequence[str | None]) -> Ties:
    """Find the rows that belong together.

    Time and memory grow linearly with the rows.

    Args:
        rows: The rows in the common form; they are gone through once.
        groups: The value of `dataset.group_by` of each row; None: the row belongs to no group.
    """
    texts = _Texts(len(groups))
    for number, row in enumerate(rows):
        texts.add(number, wording(row))
    ties, common_texts = texts.equal()
    ties += texts.near_twins()
    ties += _grouped(groups)
    return Ties(ties, common_texts, texts.comparisons)


class _Texts:
    """The texts of all rows, as hashes.

    Args:
        count: The number of rows.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._keys = array("Q")
        self._key_rows = array("q")
        self._key_kinds = array("B")
        self._phrases = PhraseIndex(count, kinds=2)
        self._phrase_rows = array("q")
        self._phrase_keys = array("Q")

    @property
    def comparisons(self) -> int:
        """How often two texts were compared."""
        return self._phrases.comparisons

    def add(self, number: int, texts: Wording) -> None:
        """Add the texts of a row.

        Args:
            number: The row's number.
            texts: Its texts.
        """
        question, last_answer = words(texts.question), words(texts.last_answer)
        question_key, answer_key = _key(_QUESTION, question), _key(_ANSWER, last_answer)
        row_keys = {(_hash(f"{question_key} {answer_key}"), _WHOLE)}
        if question:
            row_keys.add((question_key, _QUESTION))
        for answer in texts.answers:
            answer_words = last_answer if answer == texts.last_answer else words(answer)
            if len(answer_words) >= ANSWER_WORDS:
                row_keys.add((_key(_ANSWER, answer_words), _ANSWER))
        for key, kind in sorted(row_keys):
            self._keys.append(key)
            self._key_rows.append(number)
            self._key_kinds.append(kind)
        self._add_phrases(number, _QUESTION, question_key, question)
        self._add_phrases(number, _ANSWER, answer_key, last_answer)

    def _add_phrases(
        self,
        number: int,
        kind: int,
        key: int,
        text_words: list[str],
    ) -> None:
        if len(text_words) >= MINIMUM_WORDS:
            self._phrases.add(kind, text_words)
            self._phrase_rows.append(number)
            self._phrase_keys.append(key)

    def equal(self) -> tuple[list[list[int]], int]:
        """Return the ties of rows with an equal text, and how many texts are too common to tie."""
        limit = common_limit(max(MAXIMUM_REPETITIONS, self._count // 10), self._count)
        ties: list[list[int]] = []
        common_texts = 0
        for kind, members in _runs(self._keys, self._key_rows, self._key_kinds):
            if kind != _WHOLE and len(members) > limit:
                common_texts += 1
            else:
                ties.append(members)
        return ties, common_texts

    def near_twins(self) -> list[list[int]]:
        """Return the pairs of rows that are near twins."""
        pairs = self._phrases.near_twins(self._phrase_keys)
        rows = self._phrase_rows
        # A question and an answer are of different kinds, so that no row is its own near twin.
        return [[rows[first], rows[second]] for first, second in pairs]


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
    digest = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest)


def _root(parents: "array[int]", number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
