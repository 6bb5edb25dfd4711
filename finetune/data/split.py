"""Divide rows by fractions, whole groups at a time."""

from collections.abc import Sequence

from finetune.config.sections.dataset import DatasetSettings
from finetune.errors import refusal


def held_out_count(split: str, settings: DatasetSettings, total: int, remaining: int) -> int:
    """Return how many rows a split's fraction takes.

    Args:
        split: `eval` or `test`.
        settings: They hold the fraction, of all rows.
        total: The number of all rows.
        remaining: The number of rows that no other split has taken.

    Raises:
        ConfigError: The fraction takes no row, or leaves none.
    """
    fraction: float = getattr(settings, f"{split}_fraction")
    count = round(fraction * total)
    if fraction > 0 and not 0 < count < remaining:
        reason = f"takes {count} of {total} rows; 0 means none wanted"
        raise refusal(f"dataset.{split}_fraction", fraction, reason)
    return count


def take_groups(order: list[int], groups: Sequence[int], count: int) -> tuple[list[int], list[int]]:
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
