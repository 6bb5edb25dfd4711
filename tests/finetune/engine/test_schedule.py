"""The order in which an epoch visits its rows, and the warm-up."""

import math
import random
from typing import get_args

import pytest
from support.configs import compose

from finetune.config.sections.optimizer import ScheduleName
from finetune.engine.schedule import epoch_order, warmup_steps

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


SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": "{min_lr_rate:0.1}",
    "warmup_stable_decay": "{num_decay_steps:3}",
}


@pytest.mark.parametrize("ratio", [0, 0.04, 0.05, 0.2])
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_the_warmup_ends_where_transformers_rate_is_first_at_its_highest(
    schedule: str, ratio: float
) -> None:
    import torch
    from transformers import get_scheduler

    total = 54
    overrides = []
    if schedule in SCHEDULE_ARGUMENTS:
        arguments = SCHEDULE_ARGUMENTS[schedule]
        overrides = [f"+trainer.extra.lr_scheduler_kwargs={arguments}"]
    config = compose(
        f"optimizer.lr_scheduler_type={schedule}",
        f"optimizer.warmup_ratio={ratio}",
        *overrides,
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    rates = get_scheduler(
        schedule,
        torch.optim.SGD([parameter], lr=1.0),
        # As transformers' TrainingArguments turn a share into steps.
        num_warmup_steps=math.ceil(ratio * total),
        num_training_steps=total,
        scheduler_specific_kwargs=config.trainer.extra.get("lr_scheduler_kwargs"),
    ).lr_lambdas[0]
    factors = [rates(step) for step in range(total)]
    assert warmup_steps(config.optimizer, total) == factors.index(max(factors))
