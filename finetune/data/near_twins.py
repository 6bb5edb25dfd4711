"""Texts that share most of their phrases of eight words, found in linear time.

Each text is represented by the hashes of its phrases, of long texts by a sample of them. Phrases of
many texts (an instruction that stands in every row) are left out, so that no phrase is looked at
for more than `MAXIMUM_TEXTS` texts, and shared instructions tie nothing together.
"""

import tempfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.files.cache import cache_folder

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
"""Phrases of all texts together that are compared, where there are at least 16 of each text."""

_BUCKET_SAMPLES = 2**22
"""Phrases that are compared at a time: bounds the memory."""

_BATCH_WORDS = 2**20

_MULTIPLIER = 0x9E3779B97F4A7C15

_SAMPLE = [("hash", "<u8"), ("text", "<u4")]


def phrases_per_text(rows: int, kinds: int) -> int:
    """Return how many phrases represent a text; of shorter texts all phrases do.

    Args:
        rows: How many rows the texts come from; each has at most one text of a kind.
        kinds: How many kinds of text there are.
    """
    return min(256, max(16, _SAMPLES // max(rows * kinds, 1)))


@dataclass(frozen=True)
class HashedPhrases:
    """The sampled phrases of some texts."""

    lengths: "Numbers"
    """The number of all phrases of each text."""
    hashes: "Numbers"
    """Of each sampled phrase."""
    texts: "Numbers"
    """Of each sampled phrase the number of its text, among these."""


class PhraseHasher:
    """Hashes the phrases of texts.

    Args:
        samples: How many phrases represent a text (`phrases_per_text`).
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._words = array("I")
        self._text_lengths: list[int] = []
        self._text_kinds: list[int] = []
        self._lengths: list[Numbers] = []
        self._hashes: list[Numbers] = []
        self._texts: list[Numbers] = []
        self._count = 0

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
        self._text_lengths.append(len(words))
        self._text_kinds.append(kind)
        if len(self._words) >= _BATCH_WORDS:
            self._hash_batch()

    def finish(self) -> HashedPhrases:
        """Return the phrases of all texts that were added."""
        import numpy as np

        self._hash_batch()
        if not self._hashes:
            empty = np.empty(0, np.uint64)
            return HashedPhrases(empty, empty, empty)
        return HashedPhrases(
            np.concatenate(self._lengths),
            np.concatenate(self._hashes),
            np.concatenate(self._texts),
        )

    def _hash_batch(self) -> None:
        """Hash the phrases of the texts added since the last batch, and keep a sample."""
        if not self._text_lengths:
            return
        import numpy as np

        words = _scramble(np.frombuffer(self._words, np.uint32).astype(np.uint64))
        phrases = np.zeros(len(words) - PHRASE_WORDS + 1, np.uint64)
        for position in range(PHRASE_WORDS):
            following_words = words[position:][: len(phrases)]
            phrases = phrases * np.uint64(_MULTIPLIER) + following_words
        lengths = np.array(self._text_lengths)
        text_of_word = np.repeat(np.arange(len(lengths)), lengths)
        text_of_phrase = text_of_word[: len(phrases)]
        # A phrase that begins in one text and ends in the next one is none.
        is_within = text_of_phrase == text_of_word[PHRASE_WORDS - 1 :]
        kinds = np.array(self._text_kinds, np.uint64)
        hashes = _scramble(phrases + kinds[text_of_phrase])

        phrase_counts = lengths - PHRASE_WORDS + 1
        rates = np.minimum(1.0, self._samples / phrase_counts)
        bounds = (rates * float(2**32)).astype(np.uint64)
        # By the hash, so that two texts sample the same phrases of those that they share.
        is_sampled = (hashes >> np.uint64(32)) < bounds[text_of_phrase]
        chosen = is_within & is_sampled
        self._hashes.append(hashes[chosen])
        self._texts.append((text_of_phrase[chosen] + self._count).astype(np.uint32))
        self._lengths.append(phrase_counts.astype(np.uint32))
        self._count += len(lengths)
        self._words = array("I")
        self._text_lengths = []
        self._text_kinds = []


class PhraseIndex:
    """The phrases of all texts, on disk in buckets that are compared one after the other.

    Use it as a context manager, which removes the buckets.

    Args:
        rows: How many rows the texts come from; each has at most one text of a kind.
        kinds: How many kinds of text there are.
    """

    def __init__(self, rows: int, kinds: int) -> None:
        self._samples = phrases_per_text(rows, kinds)
        self._common_limit = common_limit(MAXIMUM_TEXTS, rows)
        self._buckets: list[IO[bytes]] = []
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(1 + rows * kinds * self._samples // _BUCKET_SAMPLES):
            self._buckets.append(_temporary_file(folder))
        self._lengths = array("I")
        self.comparisons = 0
        """How often two texts were compared for a phrase that they share."""

    def __enter__(self) -> "PhraseIndex":
        return self

    def __exit__(self, *error: object) -> None:
        for bucket in self._buckets:
            bucket.close()

    def extend(self, phrases: HashedPhrases) -> None:
        """Add the phrases of further texts."""
        import numpy as np

        samples = np.empty(len(phrases.hashes), _SAMPLE)
        samples["hash"] = phrases.hashes
        samples["text"] = phrases.texts + len(self._lengths)
        # The upper bits say which phrases are sampled, so that buckets are chosen by the lower.
        bucket_numbers = phrases.hashes % np.uint64(len(self._buckets))
        for number, bucket in enumerate(self._buckets):
            bucket.write(samples[bucket_numbers == number].tobytes())
        self._lengths.frombytes(phrases.lengths.astype(np.uint32).tobytes())

    def near_twins(self, keys: "array[int]") -> list[tuple[int, int]]:
        """Return pairs of texts that are near twins, by their numbers in the order of `extend`.

        Args:
            keys: A key of each text, the same for equal texts. Only the first of equal texts is
                compared, so that repetition makes no phrase common.
        """
        import numpy as np

        if not self._lengths:
            return []
        _, first, inverse = np.unique(
            np.frombuffer(keys, np.uint64), return_index=True, return_inverse=True
        )
        is_first = first[inverse] == np.arange(len(self._lengths))
        codes = np.empty(0, np.int64)
        shared = np.empty(0, np.int64)
        own_phrases = np.zeros(len(self._lengths), np.int64)
        for bucket in self._buckets:
            bucket.seek(0)
            samples = np.frombuffer(bucket.read(), _SAMPLE)
            samples = samples[is_first[samples["text"]]]
            bucket_codes, rare_texts = self._compare(samples["hash"], samples["text"])
            own_phrases += np.bincount(rare_texts, minlength=len(self._lengths))
            codes, shared = _count_codes(codes, shared, bucket_codes)
        pairs = np.stack(
            [codes // len(self._lengths), codes % len(self._lengths)], axis=1
        )
        return self._choose(pairs, shared, own_phrases)

    def _choose(
        self, pairs: "Numbers", shared: "Numbers", own_phrases: "Numbers"
    ) -> list[tuple[int, int]]:
        """The pairs that share enough phrases.

        Args:
            pairs: Two texts in each row.
            shared: How many sampled phrases each pair shares.
            own_phrases: How many sampled phrases of each text are not common.
        """
        import numpy as np

        lengths = np.frombuffer(self._lengths, np.uint32)
        rates = np.minimum(1.0, self._samples / lengths)
        # A shared phrase is in both samples only if the sample of the longer text has it.
        estimate = shared / rates[pairs].min(axis=1)
        longer = (own_phrases[pairs] / rates[pairs]).max(axis=1)
        is_long = longer >= MINIMUM_PHRASES
        is_sure = shared >= SHARED_PHRASES * MINIMUM_PHRASES
        is_near = is_long & is_sure & (estimate >= SHARED_PHRASES * longer)
        return [(int(first), int(second)) for first, second in pairs[is_near]]

    def _compare(
        self, hashes: "Numbers", texts: "Numbers"
    ) -> "tuple[Numbers, Numbers]":
        """Compare the texts of each phrase that is not common.

        Args:
            hashes: Of each phrase.
            texts: The text of each.

        Returns:
            A number for each pair of texts and each phrase that they share (`first * count +
            second`), and the text of each phrase that is not common.
        """
        import numpy as np

        order = np.lexsort((texts, hashes))
        hashes, texts = hashes[order], texts[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (texts[1:] != texts[:-1])
        hashes, texts = hashes[is_new], texts[is_new]
        _, phrases, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        texts_of_phrase = counts[phrases]
        is_rare = texts_of_phrase <= self._common_limit
        is_shared = is_rare & (texts_of_phrase > 1)
        codes = self._pairs(phrases[is_shared], texts[is_shared])
        return codes, texts[is_rare]

    def _pairs(self, phrases: "Numbers", texts: "Numbers") -> "Numbers":
        """All pairs of texts with a phrase in common, once for each such phrase."""
        import numpy as np

        codes = [np.empty(0, np.int64)]
        for distance in range(1, MAXIMUM_TEXTS):
            is_pair = phrases[distance:] == phrases[:-distance]
            if not is_pair.any():
                break
            first, second = texts[:-distance][is_pair], texts[distance:][is_pair]
            codes.append(first.astype(np.int64) * len(self._lengths) + second)
        pairs: Numbers = np.concatenate(codes)
        self.comparisons += len(pairs)
        return pairs


def _count_codes(
    codes: "Numbers", counts: "Numbers", further_codes: "Numbers"
) -> "tuple[Numbers, Numbers]":
    """Count numbers on.

    Args:
        codes: Different numbers, sorted.
        counts: How often each was seen.
        further_codes: Numbers to count.

    Returns:
        The numbers and their counts.
    """
    import numpy as np

    all_codes = np.concatenate([codes, further_codes])
    weights = np.concatenate([counts, np.ones(len(further_codes), np.int64)])
    distinct, inverse = np.unique(all_codes, return_inverse=True)
    totals = np.bincount(inverse, weights=weights, minlength=len(distinct))
    return distinct, totals.astype(np.int64)


def _temporary_file(folder: Path) -> IO[bytes]:
    """A file without a name, which is removed when it is closed."""
    return tempfile.TemporaryFile(dir=folder)


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
