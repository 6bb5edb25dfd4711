"""Bases on pretend GPUs, and slots that train on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import RunConfig
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.requests import Evaluate, ForwardBackward, Generate
from finetune.engine.probes import _answers
from support.banks import load_bank
from support.pretend_gpus import pretend_gpus, spread
from support.runs import final, losses

Tiny = Callable[..., RunConfig]


def llama(tiny_base: Path, folder: Path, tied: bool, layers: int = 8) -> Path:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_base)
    config.num_hidden_layers = layers
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def train(
    configs: list[RunConfig], saves: bool | None, borrows_blocks: bool = False
) -> dict[str, Any]:
    """Train slots for some steps, evaluate them and let them answer.

    Args:
        configs: Of each slot.
        saves: See `load_bank`.
        borrows_blocks: See `load_bank`.
    """
    bank = load_bank(configs[0], saves, borrows_blocks)
    slots = [bank.slots.create(config.lora, config.seed) for config in configs]
    # No probe has found it wrong.
    assert isinstance(bank.backends.current, AutogradBackend) is (saves is None)
    generator = torch.Generator().manual_seed(1)
    figures = []
    gradients = []
    for slot in slots:
        # Other weights in each slot, none of them zero.
        noise = 0.02 * torch.randn(slot.vector.shape, generator=generator)
        slot.vector.add_(noise.to(slot.vector.device))
    # Triton's interpreter is slow.
    steps = 2 if saves is None else 1
    for step in range(1, steps + 1):
        requests = []
        for number, slot in enumerate(slots):
            ids = torch.randint(0, 500, (2, 9 + number), generator=generator).tolist()
            rows = [{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in ids]
            noise_alpha = 5.0 if number == 1 else None
            requests.append(
                ForwardBackward(slot, rows, 0.1, step, noise_alpha=noise_alpha)
            )
        results = bank.forward_backward(requests)
        evaluations = bank.evaluate(
            [
                Evaluate(slot, request.rows)
                for slot, request in zip(slots, requests, strict=True)
            ]
        )
        for result, evaluation in zip(results, evaluations, strict=True):
            figures += [result.loss, result.norm, *evaluation.row_losses]
            figures += [*evaluation.row_tokens, *evaluation.row_correct]
        for slot in slots:
            gradients.append(slot.gradient.cpu().clone())
            slot.vector.sub_(slot.gradient)
    answered = answers(bank, slots)
    # Every shortcut holds, or the ways that are compared would be the slow ones.
    assert set(_answers[bank.base].values()) == {None}
    return {
        "devices": {weight.device for weight in bank.base.parameters()},
        "figures": figures,
        "gradients": gradients,
        "answers": answered,
        "slot_devices": [slot.device for slot in slots],
    }


def answers(bank: Any, slots: list[Any]) -> Any:
    from finetune.engine.encoded_prompts import EncodedPrompts

    prompts = EncodedPrompts([[5, 9, 30], [7, 70]], [6, 4], [], 1)
    return bank.generate([Generate(slot, prompts) for slot in slots])


def load_on_pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.model.loading import load_base

    def load(*arguments: Any) -> Any:
        return spread(load_base(*arguments))

    monkeypatch.setattr("finetune.model.loading.load_base", load)


def configs_of(tiny: Tiny, folder: Path, count: int, *more: str) -> list[RunConfig]:
    targets = ("q_proj", "down_proj"), ("v_proj",), ("q_proj", "k_proj", "up_proj")
    return [
        tiny(
            f"model.name_or_path={folder}",
            "quantization=none",
            f"lora.target_modules=[{','.join(targets[number % 3])}]",
            f"lora.r={2 + number}",
            f"seed={number}",
            *more,
        )
        for number in range(count)
    ]


def assert_resumed_is_alone(
    complete: Callable[[Path], None],
    spread_base: Callable[[], None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare a run that is interrupted and resumed on pretend GPUs with the run on one device.

    Args:
        complete: Runs, or goes on with the run, in a folder.
        spread_base: Lets bases be spread from now on.
        folder: Of both runs.
        monkeypatch: Of the test.
    """
    complete(folder / "alone")
    spread_base()
    with pretend_gpus(monkeypatch):
        _interrupt_after(3, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            complete(folder / "spread")
        complete(folder / "spread")
    alone, resumed = losses(folder / "alone"), losses(folder / "spread")
    assert resumed == pytest.approx(alone, rel=1e-4)
    name = "eval/loss"
    metrics = [final(folder / run)["metrics"][name] for run in ("alone", "spread")]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)


def _interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run once, after some passes."""
    from finetune.engine.packed.bank import Bank

    original = Bank.forward_backward
    passes = iter(range(1000))

    def forward_backward(self: Any, requests: Any) -> Any:
        if next(passes) == steps:
            raise KeyboardInterrupt
        return original(self, requests)

    monkeypatch.setattr(Bank, "forward_backward", forward_backward)
