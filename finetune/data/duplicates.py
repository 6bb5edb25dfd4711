"""Rows that belong together: the same question, the same long answer, near twins, the same group.

Such rows never stand both in training and among the held-out rows. This module finds them: `split`
keeps them together, `rows` leaves out those of held-out files.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.near_twins import (
    MINIMUM_WORDS,
    HashedPhrases,
    PhraseHasher,
    PhraseIndex,
    common_limit,
    phrases_per_text,
)
from finetune.data.row_chunks import map_chunks
from finetune.data.types import Row
from finetune.data.wording import ANSWER_WORDS, Wording, join_words, wording, words

_WHOLE, _QUESTION, _ANSWER = range(3)

_KINDS = 2
"""Kinds of text that are compared by their phrases: questions and answers."""

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

    def save(self, path: Path) -> None:
        """Write the ties to a file, a NumPy archive."""
        import numpy as np

        members = np.fromiter(itertools.chain.from_iterable(self.ties), np.int64)
        lengths = np.fromiter(map(len, self.ties), np.int64)
        counts = np.array([self.common_texts, self.comparisons])
        np.savez(
            path,
            members=members,
            lengths=lengths,
            counts=counts,
        )

    @classmethod
    def load(cls, path: Path) -> "Ties":
        """Read the ties that `save` wrote."""
        import numpy as np

        with np.load(path) as arrays:
            members: list[int] = arrays["members"].tolist()
            lengths: list[int] = arrays["lengths"].tolist()
            common_texts, comparisons = arrays["counts"].tolist()
        remaining = iter(members)
        ties = [list(itertools.islice(remaining, length)) for length in lengths]
        return cls(ties, common_texts, comparisons)

    @classmethod
    def check(cls, path: Path) -> None:
        """Open a file that `save` wrote, to see whether it is complete.

        Raises:
            Exception: It is missing or damaged.
        """
        import numpy as np

        with path.open("rb") as stream, np.load(stream) as arrays:
            arrays["counts"]

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


def group_key(group: str | None) -> int:
    """Return the key of a value of `dataset.group_by`; 0: the row belongs to no group."""
    return 0 if group is None else max(_hash(group), 1)


def find_ties(rows: Sequence[Row], groups: "array[int]") -> Ties:
    """Find the rows that belong together.

    Time grows linearly with the rows. Of each row about a hundred bytes are kept in memory; the
    phrases are on disk.

    Args:
        rows: The rows in the common form; they are gone through once.
        groups: The `group_key` of each row.
    """
    with PhraseIndex(len(rows), _KINDS) as phrases:
        index = _TextIndex(len(rows), phrases)
        for hashes in map_chunks(_HashTexts(len(rows)), rows, "comparing rows"):
            index.extend(hashes)
        ties, common_texts = index.equal()
        ties += index.near_twins()
    ties += _grouped(groups)
    return Ties(ties, common_texts, phrases.comparisons)


@dataclass
class _TextHashes:
    """The texts of some rows, as hashes."""

    rows: int = 0
    """How many rows."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of each text and of each row as a whole."""
    key_rows: "array[int]" = field(default_factory=lambda: array("q"))
    """The row of each key, among these rows."""
    key_kinds: "array[int]" = field(default_factory=lambda: array("B"))
    phrase_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of each text that is long enough to be compared by its phrases."""
    phrase_rows: "array[int]" = field(default_factory=lambda: array("q"))
    """The row of each such text, among these rows."""
    phrases: HashedPhrases | None = None


@dataclass(frozen=True)
class _HashTexts:
    """Hashes the texts of rows."""

    count: int
    """The number of all rows."""

    def __call__(self, rows: Sequence[Row]) -> _TextHashes:
        hashes = _TextHashes(len(rows))
        hasher = PhraseHasher(phrases_per_text(self.count, _KINDS))
        for number, row in enumerate(rows):
            self._add(
                hashes,
                hasher,
                number,
                wording(row),
            )
        hashes.phrases = hasher.finish()
        return hashes

    def _add(
        self, hashes: _TextHashes, hasher: PhraseHasher, number: int, texts: Wording
    ) -> None:
        question, last_answer = words(texts.question), words(texts.last_answer)
        question_key = _key(_QUESTION, question)
        answer_key = _key(_ANSWER, last_answer)
        row_keys = {(_hash(f"{question_key} {answer_key}"), _WHOLE)}
        if question:
            row_keys.add((question_key, _QUESTION))
        for answer in texts.answers:
            is_last = answer == texts.last_answer
            answer_words = last_answer if is_last else words(answer)
            if len(answer_words) >= ANSWER_WORDS:
                row_keys.add((_key(_ANSWER, answer_words), _ANSWER))
        for key, kind in sorted(row_keys):
            hashes.keys.append(key)
            hashes.key_rows.append(number)
            hashes.key_kinds.append(kind)
        phrased_texts = (
            (_QUESTION, question, question_key),
            (_ANSWER, last_answer, answer_key),
        )
        for kind, text_words, key in phrased_texts:
            if len(text_words) < MINIMUM_WORDS:
                continue
            hasher.add(kind, text_words)
            hashes.phrase_rows.append(number)
            hashes.phrase_keys.append(key)


class _TextIndex:
    """The texts of all rows, as hashes.

    Args:
        count: The number of rows.
        phrases: The phrases of the texts.
    """

    def __init__(self, count: int, phrases: PhraseIndex) -> None:
        self._count = count
        self._rows = 0
        self._keys = array("Q")
        self._key_rows = array("q")
        self._key_kinds = array("B")
        self._phrases = phrases
        self._phrase_rows = array("q")
        self._phrase_keys = array("Q")

    def extend(self, hashes: _TextHashes) -> None:
        """Add the texts of the next rows."""
        assert hashes.phrases is not None
        self._keys += hashes.keys
        self._key_kinds += hashes.key_kinds
        self._key_rows.extend(self._rows + row for row in hashes.key_rows)
        self._phrases.extend(hashes.phrases)
        self._phrase_keys += hashes.phrase_keys
        self._phrase_rows.extend(self._rows + row for row in hashes.phrase_rows)
        self._rows += hashes.rows

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


def _grouped(groups: "array[int]") -> list[list[int]]:
    """The numbers of the rows of the same group, where there are several."""
    rows = array("q", (row for row, key in enumerate(groups) if key))
    keys = array("Q", (groups[row] for row in rows))
    kinds = array("B", bytes(len(rows)))
    return [members for _, members in _runs(keys, rows, kinds)]


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
