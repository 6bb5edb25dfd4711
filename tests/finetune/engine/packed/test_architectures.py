"""Architectures in the packed engine: each row alone, by the base's own code and PEFT, is the
reference."""

import copy
from pathlib import Path

import pytest
from support.architectures import PACKED, packed_model
from support.models import load_tokenizer, with_tokenizer_of
from support.packs import (
    BATCHES,
    PREFIX,
    Pack,
    answers_of_slots,
    own_loss,
    rows_that_begin_alike,
    share_of_difference,
)
from support.runs import NONE, Tiny, losses

pytestmark = pytest.mark.filterwarnings("ignore")

BY_DEFAULT = {
    "Llama", "Gemma2", "Gemma3Text", "Gemma4Text", "Phi3", "Granite", "Cohere2", "GPTNeoX",
    "GraniteSWA", "Qwen3_5Text", "Lfm2", "MiniCPM3", "Qwen3Moe", "GptOss",
}  # fmt: skip
"""One of each kind: caps, scalars, shared keys, fused layers, sinks, recurrences, values of another
width, experts."""

architectures = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
        for name in PACKED
    ],
)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@architectures
def test_a_packed_batch_is_each_row_alone_by_the_bases_own_code(
    architecture: str, checkpointing: str, tiny: Tiny
) -> None:
    import torch

    setting = f"trainer.gradient_checkpointing={checkpointing}"
    pack = Pack(architecture, tiny, setting)
    computed = pack.train(BATCHES)
    for number, (model, rows) in enumerate(zip(pack.models, BATCHES, strict=True)):
        expected = [own_loss(model, row) for row in rows]
        (0.5 * sum(expected)).backward()
        assert computed[number] == pytest.approx(float(sum(expected)), rel=1e-5)
        gradients = {
            name: weight.grad
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        slot = pack.slots[number]
        names = {weight: name for name, weight in slot.model.named_parameters()}
        flat = [
            gradients[names[weight]].flatten()
            if gradients[names[weight]] is not None
            else torch.zeros(weight.numel())
            for weight in slot.parameters
        ]
        assert share_of_difference(slot.gradient, torch.cat(flat)) < 1e-5
        assert pack.row_losses(BATCHES)[number] == pytest.approx(
            [float(loss) for loss in expected], rel=1e-5
        )


@architectures
def test_rows_and_slots_do_not_see_each_other(architecture: str, tiny: Tiny) -> None:
    """A row is changed in the middle of a batch: only its own loss changes."""
    pack = Pack(architecture, tiny, "lora.dropout=0.3")
    before = pack.row_losses(BATCHES)
    changed = copy.deepcopy(BATCHES)
    changed[0][1]["input_ids"][PREFIX + 1] = 5
    after = pack.row_losses(changed)
    assert after[0][1] != pytest.approx(before[0][1], rel=1e-4)
    assert (after[0][0], after[0][2]) == pytest.approx(
        (before[0][0], before[0][2]), rel=1e-6
    )
    assert after[1] == pytest.approx(before[1], rel=1e-6)
    # With dropout, a slot has the loss and the gradient that it has alone.
    together = pack.train(BATCHES, step=3)
    gradient = pack.slots[0].gradient.clone()
    alone = pack.train(BATCHES[:1], step=3)
    assert alone[0] == pytest.approx(together[0], rel=1e-5)
    assert share_of_difference(pack.slots[0].gradient, gradient) < 1e-5
    assert pack.train(BATCHES[:1], step=4)[0] != pytest.approx(alone[0], rel=1e-5)


@architectures
def test_an_adapter_has_the_same_logits_in_plain_peft(
    architecture: str, tiny: Tiny, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.model.adapter import save_adapter

    pack = Pack(architecture, tiny)
    pack.bank.base.save_pretrained(tmp_path / "base")
    slot = pack.slots[1]
    save_adapter(slot.model, load_tokenizer(pack.config), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([BATCHES[1][0]["input_ids"]])
    with torch.no_grad(), pack.bank.backends.autograd.adapted_rows([slot]) as adapted:
        ours = adapted.eval()(input_ids=ids, use_cache=False).logits
        theirs = plain(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    # Of its losses in training too, not those of generation alone.
    expected = [float(own_loss(plain, row)) for row in BATCHES[1]]
    assert pack.row_losses(BATCHES)[1] == pytest.approx(expected, rel=1e-4)


@architectures
def test_answers_and_label_likelihoods_in_slots_are_those_of_each_alone(
    architecture: str, tiny: Tiny
) -> None:
    from finetune.engine.packed.requests import Evaluate

    pack = Pack(architecture, tiny)
    together, alone = answers_of_slots(pack, 24)
    assert together == alone
    # Groups of two rows that begin alike, as a row has them with each of its labels.
    groups = [row for seed in (3, 4) for row in rows_that_begin_alike(seed, 2)]
    likelihoods = pack.bank.evaluate(
        [Evaluate(slot, groups, group_size=2) for slot in pack.slots]
    )
    for model, evaluation in zip(pack.models, likelihoods, strict=True):
        expected = [float(own_loss(model, row)) for row in groups]
        assert evaluation.row_losses == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def saved(architecture: str, tiny: Tiny, tiny_base: Path, tmp_path: Path) -> list[str]:
    """The overrides of a run on a tiny base of an architecture."""
    tokenizer = load_tokenizer(tiny())
    model = packed_model(architecture, len(tokenizer), tokenizer.eos_token_id)
    base = with_tokenizer_of(tiny_base, model, tmp_path / "base")
    return [f"model.name_or_path={base}", NONE, "dataset.max_length=64"]


@architectures
def test_the_check_lets_it_train_packed_and_its_memory_is_planned(
    architecture: str, saved: list[str], tiny: Tiny
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base
    from finetune.run.memory_plan import plan_memory
    from finetune.run.resources import SharedResources

    config = tiny(*saved, "trainer.engine=packed")
    assert choose_engine(config, find_base(config.model)) == "packed"
    plan = plan_memory(config, SharedResources())
    assert plan.fullest.activations.single.peak > 0
    assert plan.fullest.base > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.matrix)
        for name in PACKED
    ],
)
def test_one_slot_trains_as_trl_does(
    architecture: str, saved: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    from finetune.run.context import RunContext
    from finetune.run.run import run

    for engine in ("trl", "packed"):
        config = tiny(
            *saved,
            f"trainer.engine={engine}",
            "trainer.max_steps=20",
            "trainer.eval_steps=0",
            "trainer.save_steps=0",
            "trainer.per_device_train_batch_size=3",
            "lora.dropout=0",
            "sample_prompts=[]",
        )
        run(config, tmp_path / engine, RunContext(interactive=False))
    ours = losses(tmp_path / "packed")
    assert len(ours) == 20
    assert ours == pytest.approx(losses(tmp_path / "trl"), rel=1e-5)
