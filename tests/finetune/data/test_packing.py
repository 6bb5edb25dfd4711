"""Packed sequences: several rows in one sequence have the losses of the rows alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import Row
from support.rows import CHATS, MANY_TURNS, Settings, texts, tokenize

from finetune.config.schema import RunConfig
from finetune.data.encoding import IGNORED

pytestmark = pytest.mark.usefixtures("fresh_cache")


def packed_and_single(
    rows: list[Row], tokenizer: Any, settings: Settings, length: int
) -> tuple[Any, Any]:
    """The tokens of the same rows, several in a sequence and one by one."""
    packed = tokenize(
        "train", rows, tokenizer, settings(packing=True, max_length=length)
    )
    single = tokenize("train", rows, tokenizer, settings(max_length=length))
    assert len(packed) < len(single)
    assert max(len(lengths) for lengths in (row["seq_lengths"] for row in packed)) > 2
    return packed, single


def sharp_model(tiny: Callable[..., RunConfig]) -> Any:
    """The tiny base with weights so large that what a token attends to shows clearly in its
    loss."""
    import torch

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    model = load_base(find_base(config.model), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8)
    return model


@pytest.mark.parametrize(
    "rows", [[*CHATS, MANY_TURNS], texts(12)], ids=["chats", "texts"]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_sequences_cost_what_their_rows_cost_alone(
    tiny: Callable[..., RunConfig],
    tokenizer: Any,
    settings: Settings,
    rows: list[Row],
    batch_size: int,
) -> None:
    from finetune.engine.evaluation import evaluate

    model, quantization = sharp_model(tiny), tiny("quantization=none").quantization
    packed, single = packed_and_single(rows, tokenizer, settings, length=256)
    together = evaluate(model, packed, batch_size, quantization)
    alone = evaluate(model, single, batch_size, quantization)
    assert together.tokens == alone.tokens
    assert together.loss * together.tokens == pytest.approx(
        alone.loss * alone.tokens, rel=1e-4
    )
    assert together.accuracy == alone.accuracy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "rows", [[*CHATS, MANY_TURNS], texts(12)], ids=["chats", "texts"]
)
def test_training_on_packed_sequences_takes_each_row_for_itself(
    tiny: Callable[..., RunConfig],
    tokenizer: Any,
    settings: Settings,
    tmp_path: Path,
    rows: list[Row],
    attention: str,
) -> None:
    import torch
    from trl import SFTTrainer

    from finetune.compat import set_train_sampler
    from finetune.engine.evaluation import evaluate
    from finetune.engine.trl.arguments import training_arguments
    from finetune.engine.trl.sampler import EpochSampler

    model = sharp_model(tiny)
    model.set_attn_implementation(attention)
    packed, single = packed_and_single(rows, tokenizer, settings, length=256)
    config = tiny("quantization=none", "dataset.packing=true", "dataset.max_length=256")
    arguments = training_arguments(config, tmp_path, 1)
    trainer = SFTTrainer(
        model, arguments, train_dataset=packed.to_dataset(), processing_class=tokenizer
    )
    set_train_sampler(trainer, EpochSampler(packed.lengths, config))

    total, count = 0.0, 0
    for batch in trainer.get_train_dataloader():
        counted = int((batch["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += trainer.compute_loss(model, dict(batch)).item() * counted
        count += counted
    alone = evaluate(model, single, 1, config.quantization)
    assert count == alone.tokens
    assert total == pytest.approx(alone.loss * alone.tokens, rel=1e-4)


def test_packing_and_not_packing_cost_differently_if_rows_attend_to_each_other(
    tiny: Callable[..., RunConfig], tokenizer: Any, settings: Settings
) -> None:
    """That the two tests above can fail: without boundaries the sum is another one."""
    from finetune.engine.evaluation import evaluate

    model, quantization = sharp_model(tiny), tiny("quantization=none").quantization
    packed, single = packed_and_single(CHATS, tokenizer, settings, length=256)
    blurred = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in packed]
    alone = evaluate(model, single, 1, quantization)
    assert evaluate(model, blurred, 1, quantization).loss != pytest.approx(
        alone.loss, rel=1e-3
    )
