"""The order in which an epoch visits its rows."""

import random

import pytest

from finetune.engine.schedule import epoch_order

pytestmark = pytest.mark.usefixtures("fresh_cache")

LENGTHS = [random.Random(index).randrange(5, 200) for index in range(103)]


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_visits_each_row_once_and_each_epoch_and_seed_in_another_order(
    grouped: bool,
) -> None:
    orders = [
        epoch_order(LENGTHS, 4, seed, epoch, grouped)
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1, 2)
    ]
    assert all(sorted(order) == list(range(103)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(LENGTHS, 4, 1, 1, grouped) == orders[4]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_neither_reads_nor_moves_the_global_random_numbers(
    grouped: bool,
) -> None:
    import torch

    torch.manual_seed(1)
    random.seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    order = epoch_order(LENGTHS, 4, 0, 0, grouped)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(2)
    random.seed(2)
    assert epoch_order(LENGTHS, 4, 0, 0, grouped) == order


def test_grouped_by_length_the_longest_batch_comes_first_and_batches_hold_rows_of_like_length() -> (
    None
):
    grouped, shuffled = (
        epoch_order(LENGTHS, 4, 0, 0, group) for group in (True, False)
    )

    def batches(order: list[int]) -> list[list[int]]:
        return [
            [LENGTHS[row] for row in order[start : start + 4]]
            for start in range(0, len(order), 4)
        ]

    def padding(order: list[int]) -> int:
        return sum(max(batch) - length for batch in batches(order) for length in batch)

    assert max(LENGTHS) == LENGTHS[grouped[0]]
    assert max(batches(grouped), key=max) == batches(grouped)[0]
    assert padding(grouped) * 3 < padding(shuffled)
