"""On two GPUs: blocks that are borrowed while others are computed. python -m pytest -m gpu"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.banks import load_bank

from finetune.config.schema import RunConfig
from finetune.engine.packed.requests import Evaluate, ForwardBackward

Tiny = Callable[..., RunConfig]
pytestmark = pytest.mark.gpu
STEPS = 20


@pytest.fixture(scope="module")
def wide_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks that take as long to copy as to compute."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        dtype=torch.bfloat16,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def train(config: RunConfig, borrows_blocks: bool) -> dict[str, list[Any]]:
    """Losses, evaluations and gradients of five slots, some of whose weights change."""
    bank = load_bank(config, True, borrows_blocks)
    slots = [bank.slots.create(config.lora, seed) for seed in range(5)]
    # No probe has found it wrong.
    assert bank.backends.current.borrows_blocks == borrows_blocks
    assert len({slot.device for slot in slots}) == 1 + borrows_blocks
    generator = torch.Generator().manual_seed(1)
    for slot in slots:
        noise = 0.02 * torch.randn(slot.vector.shape, generator=generator)
        slot.vector.add_(noise.to(slot.device))
    losses, gradients = [], []
    for step in range(1, STEPS + 1):
        requests = []
        for slot in slots:
            length = int(torch.randint(8, 200, (), generator=generator))
            ids = torch.randint(3, 32000, (4, length), generator=generator).tolist()
            rows = [{"input_ids": row, "labels": row} for row in ids]
            requests.append(ForwardBackward(slot, rows, 0.001, step))
        results = bank.forward_backward(requests)
        evaluations = bank.evaluate([Evaluate(r.slot, r.rows) for r in requests])
        losses += [result.loss for result in results]
        losses += [loss for each in evaluations for loss in each.row_losses]
        gradients += [slot.gradient.cpu().clone() for slot in slots]
    return {"losses": losses, "gradients": gradients}


@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4_double"])
def test_borrowed_blocks_compute_what_the_pipeline_does(
    tiny: Tiny, wide_base: Path, quantization: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = tiny(
        f"model.name_or_path={wide_base}",
        f"quantization={quantization}",
        "trainer.gradient_checkpointing=true",
        "trainer.gpus=2",
        "lora/target=all_linear",
        "lora.dropout=0.1",
    )
    pipeline = train(config, False)
    borrowed = train(config, True)
    # In 16 bits, with other slots in a pass. A weight that comes too late changes all.
    assert borrowed["losses"] == pytest.approx(pipeline["losses"], rel=0.01)
    for mine, theirs in zip(borrowed["gradients"], pipeline["gradients"], strict=True):
        assert (mine - theirs).norm() < 0.1 * theirs.norm()


def test_steps_that_are_given_ahead_wait_for_their_weights(
    tiny: Tiny, wide_base: Path
) -> None:
    """The host does not wait between steps; the same batch has the same loss each time."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = tiny(
        f"model.name_or_path={wide_base}",
        "quantization=nf4",
        "trainer.gradient_checkpointing=true",
        "trainer.gpus=2",
    )
    bank = load_bank(config, True, borrows_blocks=True)
    slots = [bank.slots.create(config.lora, seed) for seed in range(2)]
    rows = [{"input_ids": [*range(5, 60)], "labels": [*range(5, 60)]}]
    results = []
    for _ in range(50):
        requests = [ForwardBackward(slot, rows, 0.001, 1) for slot in slots]
        results += bank.forward_backward(requests)
    losses = [result.loss for result in results]
    assert losses[2:] == pytest.approx(losses[:2] * 49, rel=1e-3)
    assert min(result.seconds for result in results) > 0
