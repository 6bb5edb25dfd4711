"""Texts that share most of their phrases of eight words, found in linear time.

Each text is represented by the hashes of its phrases, of long texts by a sample of them. Phrases of
many texts (an instruction that stands in every row) are left out, so that no phrase is looked at
for more than `MAXIMUM_TEXTS` texts, and shared instructions tie nothing together.
"""

import zlib
from array import array
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, Any]

PHRASE_WORDS = 8

MINIMUM_PHRASES = 8
"""Texts with fewer phrases that are not common are only compared as a whole."""

MINIMUM_WORDS = PHRASE_WORDS + MINIMUM_PHRASES - 1

MAXIMUM_TEXTS = 16
"""A phrase of more texts is common."""

SHARED_PHRASES = 0.5
"""Two texts are near twins if the longer one shares at least this share of its phrases."""

_SAMPLES = 2**24
"""Phrases of all texts together that are kept: bounds the memory."""

_BATCH_WORDS = 2**20

_MULTIPLIER = 0x9E3779B97F4A7C15


class PhraseIndex:
    """The phrases of texts.

    Args:
        rows: How many rows the texts come from; each has at most one text of a kind.
        kinds: How many kinds of text there are.
    """

    def __init__(self, rows: int, kinds: int) -> None:
        self._phrases_per_text = min(256, max(16, _SAMPLES // max(rows * kinds, 1)))
        self._common_limit = common_limit(MAXIMUM_TEXTS, rows)
        self._words = array("I")
        self._batch_lengths: list[int] = []
        self._batch_kinds: list[int] = []
        self._lengths = array("I")
        self._hashes: list[Numbers] = []
        self._texts: list[Numbers] = []
        self.comparisons = 0
        """How often two texts were compared for a phrase that they share."""

    def add(self, kind: int, words: list[str]) -> None:
        """Add a text of at least `MINIMUM_WORDS` words.

        Args:
            kind: Only texts of the same kind are compared.
            words: The words.
        """
        assert len(words) >= MINIMUM_WORDS
        # Joined and split again, so that no Python code runs for each word.
        encoded = " ".join(words).encode("utf-8", "surrogatepass").split(b" ")
        self._words.extend(map(zlib.crc32, encoded))
        self._batch_lengths.append(len(words))
        self._batch_kinds.append(kind)
        if len(self._words) >= _BATCH_WORDS:
            self._hash_batch()

    def near_twins(self, keys: "array[int]") -> list[tuple[int, int]]:
        """Return pairs of texts that are near twins, by their numbers in the order of `add`.

        Args:
            keys: A key of each text, the same for equal texts. Only the first of equal texts is
                compared, so that repetition makes no phrase common.
        """
        import numpy as np

        self._hash_batch()
        if not self._hashes:
            return []
        hashes = np.concatenate(self._hashes)
        texts = np.concatenate(self._texts)
        lengths = np.frombuffer(self._lengths, np.uint32)
        _, first, inverse = np.unique(
            np.frombuffer(keys, np.uint64), return_index=True, return_inverse=True
        )
        is_first = first[inverse] == np.arange(len(lengths))
        hashes, texts = hashes[is_first[texts]], texts[is_first[texts]]

        order = np.lexsort((texts, hashes))
        hashes, texts = hashes[order], texts[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (texts[1:] != texts[:-1])
        hashes, texts = hashes[is_new], texts[is_new]
        _, phrases, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        texts_of_phrase = counts[phrases]
        is_rare = texts_of_phrase <= self._common_limit
        own_phrases = np.bincount(texts[is_rare], minlength=len(lengths))
        is_shared = is_rare & (texts_of_phrase > 1)
        pairs, shared = self._count_pairs(
            phrases[is_shared], texts[is_shared], len(lengths)
        )
        return self._choose(pairs, shared, own_phrases, lengths)

    def _choose(
        self,
        pairs: "Numbers",
        shared: "Numbers",
        own_phrases: "Numbers",
        lengths: "Numbers",
    ) -> list[tuple[int, int]]:
        """The pairs that share enough phrases.

        Args:
            pairs: Two texts in each row.
            shared: How many sampled phrases each pair shares.
            own_phrases: How many sampled phrases of each text are not common.
            lengths: The number of all phrases of each text.
        """
        import numpy as np

        rates = np.minimum(1.0, self._phrases_per_text / lengths)
        # A shared phrase is in both samples only if the sample of the longer text has it.
        estimate = shared / rates[pairs].min(axis=1)
        longer = (own_phrases[pairs] / rates[pairs]).max(axis=1)
        is_near = (longer >= MINIMUM_PHRASES) & (
            shared >= SHARED_PHRASES * MINIMUM_PHRASES
        )
        is_near &= estimate >= SHARED_PHRASES * longer
        return [
            (int(first), int(second)) for first, second in np.asarray(pairs[is_near])
        ]

    def _count_pairs(
        self,
        phrases: "Numbers",
        texts: "Numbers",
        count: int,
    ) -> "tuple[Numbers, Numbers]":
        """All pairs of texts with a phrase in common, and how many phrases they have in common."""
        import numpy as np

        codes = []
        for distance in range(1, MAXIMUM_TEXTS):
            is_pair = phrases[distance:] == phrases[:-distance]
            if not is_pair.any():
                break
            first, second = texts[:-distance][is_pair], texts[distance:][is_pair]
            codes.append(first.astype(np.int64) * count + second)
        if not codes:
            return np.empty((0, 2), np.int64), np.empty(0, np.int64)
        self.comparisons = sum(map(len, codes))
        pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
        return np.stack([pairs // count, pairs % count], axis=1), shared

    def _hash_batch(self) -> None:
        """Hash the phrases of the texts added since the last batch, and keep a sample."""
        if not self._batch_lengths:
            return
        import numpy as np

        words = _scramble(np.frombuffer(self._words, np.uint32).astype(np.uint64))
        phrases = np.zeros(len(words) - PHRASE_WORDS + 1, np.uint64)
        for position in range(PHRASE_WORDS):
            phrases = (
                phrases * np.uint64(_MULTIPLIER) + words[position:][: len(phrases)]
            )
        lengths = np.array(self._batch_lengths)
        text_of_word = np.repeat(np.arange(len(lengths)), lengths)
        text_of_phrase = text_of_word[: len(phrases)]
        is_within = text_of_phrase == text_of_word[PHRASE_WORDS - 1 :]
        kinds = np.array(self._batch_kinds, np.uint64)
        hashes = _scramble(phrases + kinds[text_of_phrase])

        phrase_counts = lengths - PHRASE_WORDS + 1
        rates = np.minimum(1.0, self._phrases_per_text / phrase_counts)
        bounds = (rates * float(2**32)).astype(np.uint64)
        is_sampled = (hashes >> np.uint64(32)) < bounds[text_of_phrase]
        chosen = is_within & is_sampled
        self._hashes.append(hashes[chosen])
        self._texts.append(
            (text_of_phrase[chosen] + len(self._lengths)).astype(np.int32)
        )
        self._lengths.extend(int(number) for number in phrase_counts)
        self._words = array("I")
        self._batch_lengths = []
        self._batch_kinds = []


def common_limit(maximum: int, count: int) -> int:
    """Return how many of `count` texts may share something that is not common to all.

    Args:
        maximum: The limit where there are many texts; of few texts it is half of them.
        count: The number of texts.
    """
    return min(maximum, max(3, count // 2))


def _scramble(numbers: "Numbers") -> "Numbers":
    """Spread numbers over 64 bits (splitmix64)."""
    import numpy as np

    numbers = numbers + np.uint64(_MULTIPLIER)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: Numbers = numbers ^ (numbers >> np.uint64(31))
    return scrambled
