"""Divide rows by fractions, whole groups at a time."""

import random
from collections import Counter
from collections.abc import Sequence

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.duplicates import Ties
from finetune.data.report import Report
from finetune.errors import refusal

HELD_OUT = ("test", "eval")
"""The test rows come first, so that which rows these are depends on no other fraction."""


def divide_rows(
    settings: DatasetSettings,
    total: int,
    ties: Ties | None,
    splits: set[str],
    report: Report,
) -> tuple[list[int], dict[str, list[int]]]:
    """Take the held-out rows of the splits that no file gives from all rows.

    Args:
        settings: The fractions and the seed.
        total: The number of all rows.
        ties: The ties of these rows, and perhaps of further ones; None where no row is held out.
        splits: `eval`, `test`, both or none.
        report: Where tied rows are logged.

    Returns:
        The training rows and those of each split, shuffled, by their numbers.

    Raises:
        ConfigError: A fraction takes no row, or leaves none.
    """
    order = list(range(total))
    random.Random(f"split {settings.split_seed}").shuffle(order)
    parts: dict[str, list[int]] = {split: [] for split in splits}
    if ties is None:
        return order, parts
    groups = ties.groups(total)
    for split in HELD_OUT:
        if split not in splits:
            continue
        count = _held_out_count(
            split,
            settings,
            total,
            len(order),
            report,
        )
        if not count:
            continue
        parts[split], order = take_groups(order, groups, count)
        if not parts[split]:
            raise _all_tied(split, settings, count, groups)
    if any(parts.values()):
        _note_ties(settings, ties, groups, report)
    return order, parts


def _note_ties(
    settings: DatasetSettings,
    ties: Ties,
    groups: Sequence[int],
    report: Report,
) -> None:
    sizes = [size for size in Counter(groups).values() if size > 1]
    if sizes:
        kind = "near twins"
        if settings.group_by is not None:
            kind += f" or of one {settings.group_by} (dataset.group_by)"
        report.note(
            f"{sum(sizes)} rows in {len(sizes)} groups of {kind} stay in one part"
        )
    if ties.common_texts:
        reason = "each stand in many rows, and keep no rows together"
        report.note(f"{ties.common_texts} questions or answers {reason}")


def _all_tied(
    split: str,
    settings: DatasetSettings,
    count: int,
    groups: Sequence[int],
) -> Exception:
    """The refusal of a fraction that no group of rows fits in."""
    largest = max(Counter(groups).values())
    reason = (
        f"takes {count} of {len(groups)} rows, but {largest} of them stay in one part"
    )
    causes = "near twins"
    if settings.group_by is not None:
        causes += f", or rows of one {settings.group_by}"
    key = f"dataset.{split}_fraction"
    return refusal(
        key, getattr(settings, key.partition(".")[2]), f"{reason} as {causes}"
    )


def _held_out_count(
    split: str,
    settings: DatasetSettings,
    total: int,
    remaining: int,
    report: Report,
) -> int:
    """How many rows a split's fraction takes, at most `settings.held_out_limit`.

    Args:
        split: `eval` or `test`.
        settings: They hold the fraction, of all rows.
        total: The number of all rows.
        remaining: The number of rows that no other split has taken.
        report: Where the limit is logged.

    Raises:
        ConfigError: The fraction takes no row, or leaves none.
    """
    key = f"dataset.{split}_fraction"
    fraction = settings.held_out_fraction(split)
    count = round(fraction * total)
    limit = settings.held_out_limit(split)
    if limit is not None and count > limit:
        share = f"{key}=auto: {fraction:g}, at most {limit:,} rows"
        report.note(f"{limit:,} of {total:,} rows are {split} rows ({share})")
        count = limit
    if fraction > 0 and not 0 < count < remaining:
        value = getattr(settings, f"{split}_fraction")
        reason = f"takes {count} of {total} rows; 0 means none wanted"
        raise refusal(key, value, reason)
    return count


def take_groups(
    order: list[int], groups: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """Take whole groups of rows, as near to a count as possible.

    Args:
        order: The numbers of the rows to take from, shuffled.
        groups: The group of each row number.
        count: How many rows are wanted.

    Returns:
        The rows that are taken, and the rest, both in the order given. The first `count` rows
        where each row is a group by itself. Nothing is taken where each group is so large that
        it would be more than twice as many as wanted, or all rows.
    """
    sizes: dict[int, int] = {}
    for number in order:
        sizes[groups[number]] = sizes.get(groups[number], 0) + 1
    taken: set[int] = set()
    missing = count
    for group, size in sizes.items():
        if size <= missing:
            taken.add(group)
            missing -= size
        if not missing:
            break
    skipped = [group for group in sizes if group not in taken]
    smallest = min(skipped, key=lambda group: sizes[group], default=None)
    if smallest is not None and len(taken) + 1 < len(sizes):
        excess = sizes[smallest] - missing
        if missing > 0 and excess < missing:
            taken.add(smallest)
    members = [number for number in order if groups[number] in taken]
    rest = [number for number in order if groups[number] not in taken]
    return members, rest
