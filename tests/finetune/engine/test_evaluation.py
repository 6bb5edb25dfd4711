"""The measure of held-out rows: equal to the plain reference, blind to batching, and leaving no
trace."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.data.encoding import IGNORED

Tiny = Callable[..., RunConfig]

Row = dict[str, list[int]]


def make_model(config: RunConfig, adapter_noise: float = 0.0) -> Any:
    """Base and adapter as a run has them; with noise, the adapter does something."""
    import torch

    from finetune.model.adapter import add_adapter
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    model = add_adapter(
        load_base(find_base(config.model), config), config.lora, config.seed
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and adapter_noise:
                weight.add_(torch.randn_like(weight) * adapter_noise)
    return model


@pytest.fixture
def rows() -> list[Row]:
    """Rows of many lengths whose answers begin, and pause, at different positions."""
    draw = random.Random(0)
    made = []
    for length, first in [
        (3, 1),
        (40, 39),
        (17, 1),
        (25, 20),
        (60, 2),
        (9, 5),
        (9, 8),
        (31, 0),
        (2, 0),
        (50, 25),
    ]:
        ids = [draw.randrange(600) for _ in range(length)]
        labels = [IGNORED] * first + ids[first:]
        if length > 30:
            labels[first + 3 : first + 6] = [IGNORED] * len(
                labels[first + 3 : first + 6]
            )
        made.append({"input_ids": ids, "labels": labels})
    return made


def reference(model: Any, rows: list[Row]) -> tuple[float, float, int]:
    """Loss, accuracy and tokens by transformers' own loss, row by row, in training's plainest
    form."""
    import torch

    total, correct, tokens = 0.0, 0, 0
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        count = int((labels[:, 1:] != IGNORED).sum())
        total += output.loss.item() * count
        correct += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
        tokens += count
    return total / tokens, correct / tokens, tokens


def measured(model: Any, rows: list[Row], batch_size: int, config: RunConfig) -> Any:
    from datasets import Dataset

    from finetune.engine.evaluation import evaluate

    return evaluate(model, Dataset.from_list(rows), batch_size, config.quantization)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_equals_transformers_own_loss_row_by_row(
    tiny: Tiny, rows: list[Row], quantization: str
) -> None:
    config = tiny(f"quantization={quantization}")
    model = make_model(config, adapter_noise=0.3)
    loss, accuracy, tokens = reference(model, rows)
    result = measured(model, rows, 4, config)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == accuracy
    assert result.tokens == tokens
    assert result.metrics("eval") == {
        "eval/loss": result.loss,
        "eval/accuracy": result.accuracy,
    }


def test_weighs_tokens_and_not_rows(tiny: Tiny, rows: list[Row]) -> None:
    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    each = [measured(model, [row], 1, config) for row in rows]
    by_tokens = sum(one.loss * one.tokens for one in each) / sum(
        one.tokens for one in each
    )
    by_rows = sum(one.loss for one in each) / len(each)
    assert measured(model, rows, 4, config).loss == pytest.approx(by_tokens, rel=1e-6)
    assert by_rows != pytest.approx(by_tokens, rel=1e-4)


def test_does_not_depend_on_batch_size_or_the_order_of_rows(
    tiny: Tiny, rows: list[Row]
) -> None:
    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    one = measured(model, rows, 1, config)
    for batch_size in (2, 3, 7, 10, 100):
        result = measured(model, rows, batch_size, config)
        assert result.loss == pytest.approx(one.loss, rel=1e-5)
        assert (result.accuracy, result.tokens) == (one.accuracy, one.tokens)
    assert measured(model, rows[::-1], 3, config).loss == pytest.approx(
        one.loss, rel=1e-5
    )


def test_the_same_measurement_twice_is_the_same_bit_for_bit(
    tiny: Tiny, rows: list[Row]
) -> None:
    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    assert measured(model, rows, 3, config) == measured(model, rows, 3, config)


def test_dropout_plays_no_part_though_the_model_is_training(
    tiny: Tiny, rows: list[Row]
) -> None:
    config = tiny("quantization=none", "lora.dropout=0.5")
    model = make_model(config, adapter_noise=0.3)
    model.train()
    result = measured(model, rows, 4, config)
    assert model.training
    assert result.loss == pytest.approx(reference(model, rows)[0], rel=1e-6)


@pytest.mark.parametrize("mode", ["training", "evaluating", "fresh"])
def test_leaves_the_mode_of_every_module_as_it_was(
    tiny: Tiny, rows: list[Row], mode: str
) -> None:
    config = tiny("lora.dropout=0.1")
    model = make_model(config)
    if mode != "fresh":
        model.train(mode == "training")
    before = {name: module.training for name, module in model.named_modules()}
    measured(model, rows, 4, config)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_leaves_random_numbers_weights_and_gradients_alone(
    tiny: Tiny, rows: list[Row]
) -> None:
    import numpy
    import torch

    config = tiny("lora.dropout=0.1")
    model = make_model(config)
    model.train()
    weights = {
        name: weight.detach().clone() for name, weight in model.named_parameters()
    }
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    measured(model, rows, 4, config)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(numpy.random.get_state()) == states[2]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.grad is None
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_accuracy_is_the_share_of_tokens_that_the_model_would_choose(
    tiny: Tiny,
) -> None:
    import torch

    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    ids = [5, 300, 41, 77, 120, 9]
    with torch.no_grad():
        chosen = (
            model.eval()(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        )
    wrong = (chosen[3] + 1) % 600
    right_three_of_four = [IGNORED, chosen[0], chosen[1], chosen[2], wrong, IGNORED]
    result = measured(
        model, [{"input_ids": ids, "labels": right_three_of_four}], 1, config
    )
    assert (result.accuracy, result.tokens) == (0.75, 4)
    shifted = {
        "input_ids": ids,
        "labels": [chosen[0], *chosen[:5]],
    }  # what stands first is predicted by nothing
    assert measured(model, [shifted], 1, config).accuracy == 1.0


def test_of_rows_that_count_wholly_the_first_token_is_not_predicted(tiny: Tiny) -> None:
    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    whole: list[Row] = [
        {"input_ids": list(range(n)), "labels": list(range(n))} for n in (2, 5, 12)
    ]
    result = measured(model, whole, 2, config)
    assert result.tokens == 1 + 4 + 11
    assert result.loss == pytest.approx(reference(model, whole)[0], rel=1e-6)
    without_first: list[Row] = [
        {**row, "labels": [IGNORED, *row["labels"][1:]]} for row in whole
    ]
    assert measured(model, without_first, 2, config) == result


def test_padding_with_the_end_token_hides_no_end_token(tiny: Tiny) -> None:
    config = tiny("quantization=none")
    model = make_model(config, adapter_noise=0.3)
    end = 1
    rows: list[Row] = [
        {"input_ids": [7, 8, 9, end], "labels": [IGNORED, 8, 9, end]},
        {
            "input_ids": [end, 0, end, end, end, 5],
            "labels": [IGNORED, 0, end, end, end, 5],
        },
    ]
    result = measured(model, rows, 2, config)
    assert result.tokens == 8
    assert result.loss == pytest.approx(reference(model, rows)[0], rel=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_all_rows_begin_with_is_computed_once_and_changes_nothing(
    tiny: Tiny, rows: list[Row], quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data import lengths

    config = tiny(f"quantization={quantization}")
    model = make_model(config, adapter_noise=0.3)
    system = [7, 8, 9, 10] * 5
    together: list[Row] = [
        {
            "input_ids": system + row["input_ids"],
            "labels": [IGNORED] * len(system) + row["labels"],
        }
        for row in rows
    ]
    assert (
        lengths.common_prefix_length(together) == len(system) - 1
    )  # the last one predicts some rows' first token
    loss, accuracy, tokens = reference(model, together)
    measured(model, rows, 4, config)  # the probes, which the count leaves out
    measured(model, together, 4, config)
    computed: list[int] = []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, named: computed.append(named["input_ids"].numel()),
        with_kwargs=True,
    )
    result = measured(model, together, 4, config)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert (result.accuracy, result.tokens) == (accuracy, tokens)
    shared = sum(computed)
    monkeypatch.setattr(lengths, "MIN_SHARED_TOKENS", 1000)
    computed.clear()
    assert measured(model, together, 4, config).loss == pytest.approx(loss, rel=1e-6)
    assert sum(computed) - shared == (len(rows) - 1) * (len(system) - 1)


@pytest.mark.parametrize(
    ("ids", "first_label", "shared"),
    [
        ([[1] * 12, [1] * 12], 11, 10),  # the same rows: each still predicts its answer
        (
            [[1] * 12, [1] * 11 + [2]],
            4,
            0,
        ),  # an answer that begins within what they share
        ([[1] * 12, [2] * 12], 11, 0),
        ([[1] * 12], 11, 0),  # one row shares with none
        ([[1] * 12, [1] * 9 + [2] * 5], 9, 8),
    ],
)
def test_no_answers_token_is_in_what_rows_share(
    ids: list[list[int]], first_label: int, shared: int
) -> None:
    from finetune.data.lengths import common_prefix_length

    rows = [
        {"input_ids": row, "labels": [IGNORED] * first_label + row[first_label:]}
        for row in ids
    ]
    assert common_prefix_length(rows) == shared
