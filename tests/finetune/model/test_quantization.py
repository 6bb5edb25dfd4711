"""A quantised base: it learns, stays frozen, and has the gradients of its dequantised weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import (
    changed_copy,
    collate,
    gradients,
    load,
    load_tokenizer,
    short_tokens,
    trainable,
    wake,
)
from support.runs import Tiny

from finetune.config.schema import RunConfig

pytestmark = pytest.mark.usefixtures("fresh_cache")

QUANTIZATIONS = ["none", "nf4", "fp4", "nf4_double", "int8"]


@pytest.mark.parametrize("target", ["all_linear", "q_v"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_learns_after_an_evaluation(tiny: Tiny, quantization: str, target: str) -> None:
    import torch

    from finetune.engine.evaluation import evaluate

    config = tiny(f"quantization={quantization}", f"lora/target={target}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    batch = collate(list(rows), tokenizer)

    before = evaluate(model, rows, 2, config.quantization).loss
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    model.train()
    losses, norms = [], []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0))
        )
        optimizer.step()
        losses.append(loss.item())
    after = evaluate(model, rows, 2, config.quantization).loss

    assert min(norms) > 1e-3
    assert losses[0] == pytest.approx(
        before, rel=1e-2
    )  # int8 rounds activations by batch
    assert losses[-1] < losses[0] - 0.15
    assert after < before - 0.15


@pytest.fixture(scope="module")
def odd_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in widths that no block of bitsandbytes divides."""
    folder = tmp_path_factory.mktemp("odd") / "base"
    return changed_copy(
        tiny_base, folder, hidden_size=72, intermediate_size=100, num_attention_heads=6
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_of_odd_widths_is_measured_trained_and_asked(
    tiny: Tiny, odd_base: Path, quantization: str
) -> None:
    from finetune.engine.evaluation import evaluate
    from finetune.engine.generation import generate_answers

    config = tiny(f"quantization={quantization}", f"model.name_or_path={odd_base}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    together = evaluate(model, rows, 3, config.quantization).loss
    one_by_one = evaluate(model, rows, 1, config.quantization).loss
    assert one_by_one == pytest.approx(
        together, rel=1e-2 if quantization == "int8" else 1e-5
    )
    assert (
        len(
            generate_answers(
                model,
                tokenizer,
                ["Hm?"],
                config.quantization,
                max_new_tokens=8,
                max_length=None,
            )
        )
        == 1
    )  # one token at a time
    wake(model)
    assert all(
        gradient.abs().max() > 0
        for gradient in gradients(model, collate(list(rows), tokenizer)).values()
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_evaluation_leaves_the_gradients_of_training_as_they_are(
    tiny: Tiny, quantization: str
) -> None:
    import torch

    from finetune.engine.evaluation import evaluate

    config = tiny(f"quantization={quantization}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    batch = collate(list(rows), tokenizer)
    wake(model)
    untouched = gradients(model, batch)
    evaluate(model, rows, 1, config.quantization)
    after_evaluation = gradients(model, batch)
    assert len(untouched) == 2 * 7 * 2
    for name, gradient in untouched.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, after_evaluation[name]), name


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "nf4_double"])
def test_gradients_through_a_quantised_base_are_those_of_its_dequantised_weights(
    tiny: Tiny, quantization: str
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantised, plain = (
        load(tiny(f"quantization={quantization}")),
        load(tiny("quantization=none")),
    )
    targets = dict(plain.named_modules())
    replaced = 0
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            exact = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(exact, targets[name].weight.data)
            targets[name].weight.data = exact.to(targets[name].weight.dtype)
            replaced += 1
    assert replaced == 2 * 7

    config = tiny()
    tokenizer = load_tokenizer(config)
    rows = list(short_tokens(config, tokenizer))
    wake(quantised)
    wake(plain)
    from finetune.engine.evaluation import evaluate

    evaluate(quantised, short_tokens(config, tokenizer), 1, config.quantization)
    ours, exact_ones = (
        gradients(model, collate(rows, tokenizer)) for model in (quantised, plain)
    )
    for name, gradient in exact_ones.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_base_is_quantised_as_named_and_frozen(
    tiny: Tiny, quantization: str
) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = tiny(f"quantization={quantization}")
    model = load(config)
    four = [module for module in model.modules() if isinstance(module, Linear4bit)]
    eight = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    assert (len(four), len(eight)) == {"none": (0, 0), "int8": (0, 14)}.get(
        quantization, (14, 0)
    )
    for module in four:
        assert module.weight.quant_state.quant_type == quantization.removesuffix(
            "_double"
        )
        assert module.weight.quant_state.nested == quantization.endswith("_double")
    assert all("lora_" in name for name in trainable(model))


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "fp4"])
def test_a_base_kept_dequantised_gives_the_same_gradients_bit_for_bit(
    quantization: str, tiny: Callable[..., RunConfig]
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    from finetune.model.adapter import add_adapter
    from finetune.model.loading import load_base
    from finetune.model.quantization import dequantize_base
    from finetune.model.source import find_base

    config = tiny(f"quantization={quantization}")
    ids = torch.arange(24).reshape(2, 12)
    found = []
    for kept in (False, True):
        base = load_base(find_base(config.model), config)
        if kept:
            dequantize_base(base, config)
            assert not any(isinstance(module, Linear4bit) for module in base.modules())
        model = add_adapter(base, config.lora, seed=0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(
            [
                loss,
                *(
                    weight.grad
                    for weight in model.parameters()
                    if weight.grad is not None
                ),
            ]
        )
    assert len(found[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
