"""The training rows of several sources, by their weights."""

import random
from collections.abc import Sequence

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.report import Report
from finetune.errors import refusal


def weigh_rows(
    order: list[int],
    source_ends: Sequence[int],
    settings: DatasetSettings,
    report: Report,
) -> list[int]:
    """Return the numbers of the training rows, each as often as its source's weight says.

    Of a source of weight 2.5 each row comes twice, and half of them a third time. Which rows come
    once more is drawn by `dataset.split_seed`.

    Args:
        order: The numbers of the training rows, shuffled.
        source_ends: For each source the number that follows its last row.
        settings: The sources and their weights.
        report: Where the shares are logged.

    Raises:
        ConfigError: A weight takes no row of a source.
    """
    weights = [source.weight for source in settings.sources]
    if all(weight == 1 for weight in weights):
        return order
    weighted: list[int] = []
    phrases = []
    start = 0
    for source, end in zip(settings.sources, source_ends, strict=True):
        rows = [number for number in order if start <= number < end]
        repetitions, fraction = divmod(source.weight, 1)
        # `order` is shuffled, so that its first rows are drawn at random.
        drawn = rows * int(repetitions) + rows[: round(fraction * len(rows))]
        if rows and not drawn:
            reason = (
                f"weight {source.weight:g} takes none of its {len(rows)} training rows"
            )
            raise refusal("dataset.path", source.path, reason)
        weighted += drawn
        phrases.append(
            f"{len(drawn)} from {len(rows)} of {source.path} ({source.weight:g})"
        )
        start = end
    # Mixed again, so that dataset.limit takes of each source its share.
    random.Random(f"weights {settings.split_seed}").shuffle(weighted)
    report.note(f"training rows by weight: {', '.join(phrases)}")
    return weighted
