"""Mixtures of experts in 4 bits in the packed engine: the reference is the base's own code with the
dequantised weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import packed_model
from support.models import load_tokenizer, with_tokenizer_of
from support.packs import BATCHES, PREFIX, Pack, greedy, own_loss, share_of_difference
from support.runs import Tiny, losses

from finetune.config.schema import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore")

kinds = pytest.mark.parametrize(
    "kind",
    [
        "Qwen3Moe",
        "GptOss",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "GraniteMoe",
                "Glm4MoeLite",
                "Mixtral",
                "Qwen2Moe",
                "Gemma4Text with experts",
                "Qwen3_5MoeText",
                "DeepseekV3",
                "Jamba",
                "NemotronH",
            )
        ),
    ],
)

QUANTIZED = "quantization=nf4_double"


@pytest.fixture(autouse=True)
def keep_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny bases would be dequantised as a whole."""
    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0.0)


@pytest.fixture
def pack(tiny: Tiny, tiny_base: Path, tmp_path: Path) -> Callable[..., Pack]:
    """Return a function that creates a bank on a base in 4 bits."""

    def load(model: Any, config: RunConfig) -> tuple[Any, Any]:
        import torch

        from finetune.model.experts import dequantize_experts, quantized_expert_weights
        from finetune.model.loading import load_base
        from finetune.model.source import find_base

        folder = with_tokenizer_of(tiny_base, model, tmp_path / "base")
        config = tiny(f"model.name_or_path={folder}", QUANTIZED)
        base = load_base(find_base(config.model), config).eval()
        assert list(quantized_expert_weights(base))
        reference = copy.deepcopy(base)
        dequantize_experts(reference, torch.float32)
        reference.set_experts_implementation("eager")
        return base, reference

    def create(kind: str, *overrides: str) -> Pack:
        return Pack(kind, tiny, QUANTIZED, *overrides, load=load)

    return create


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@kinds
def test_a_packed_batch_is_each_row_alone(
    kind: str, checkpointing: str, pack: Callable[..., Pack]
) -> None:
    import torch

    bank = pack(kind, f"trainer.gradient_checkpointing={checkpointing}")
    computed = bank.train(BATCHES)
    for number, (model, rows) in enumerate(zip(bank.models, BATCHES, strict=True)):
        expected = [own_loss(model, row) for row in rows]
        (0.5 * sum(expected)).backward()
        assert computed[number] == pytest.approx(float(sum(expected)), rel=1e-5)
        slot = bank.slots[number]
        names = {weight: name for name, weight in slot.model.named_parameters()}
        gradients = [
            model.get_parameter(names[weight]).grad.flatten()
            for weight in slot.parameters
        ]
        assert share_of_difference(slot.gradient, torch.cat(gradients)) < 1e-5
        assert bank.row_losses(BATCHES)[number] == pytest.approx(
            [float(loss) for loss in expected], rel=1e-5
        )


@kinds
def test_rows_and_slots_do_not_see_each_other(
    kind: str, pack: Callable[..., Pack]
) -> None:
    bank = pack(kind)
    before = bank.row_losses(BATCHES)
    changed = copy.deepcopy(BATCHES)
    changed[0][1]["input_ids"][PREFIX + 1] = 5
    after = bank.row_losses(changed)
    assert after[0][1] != pytest.approx(before[0][1], rel=1e-4)
    assert (after[0][0], after[0][2]) == pytest.approx(
        (before[0][0], before[0][2]), rel=1e-6
    )
    assert after[1] == pytest.approx(before[1], rel=1e-6)


@kinds
def test_answers_in_slots_are_those_of_each_alone(
    kind: str, pack: Callable[..., Pack]
) -> None:
    from finetune.data.types import Prompt
    from finetune.engine.encoded_prompts import encode_prompts
    from finetune.engine.packed.requests import Generate

    bank = pack(kind)
    requests = []
    for slot in bank.slots:
        prompts = encode_prompts(
            bank.bank.base,
            load_tokenizer(bank.config),
            [Prompt(text) for text in ("Hm?", "What does math.gcd do, and why?")],
            max_new_tokens=16,
            max_length=None,
            variables=None,
            sampling=None,
        )
        requests.append(Generate(slot, prompts))
    answers = bank.bank.generate(requests)
    for model, request, given in zip(bank.models, requests, answers, strict=True):
        for ids, answer in zip(request.prompts.ids, given, strict=True):
            assert answer == greedy(model, ids, 16, request.prompts.ends)


@pytest.mark.slow
@kinds
def test_a_run_in_4_bits_is_trls_and_its_adapter_plain_pefts(
    kind: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    """The same losses over 20 steps, and the adapter's logits on the dequantised base."""
    import torch
    from peft import PeftModel

    from finetune.model.experts import dequantize_experts
    from finetune.run.context import RunContext
    from finetune.run.load import load_run
    from finetune.run.merging import merge
    from finetune.run.run import run

    model = packed_model(kind, 600, 1)
    folder = with_tokenizer_of(tiny_base, model, tmp_path / "base")
    for engine in ("trl", "packed"):
        config = tiny(
            f"model.name_or_path={folder}",
            QUANTIZED,
            "dataset.max_length=64",
            f"trainer.engine={engine}",
            "trainer.max_steps=20",
            "trainer.eval_steps=0",
            "trainer.save_steps=0",
            "trainer.per_device_train_batch_size=3",
            "optimizer.learning_rate=0.01",
            "lora.dropout=0",
            "sample_prompts=[]",
        )
        run(config, tmp_path / engine, RunContext(interactive=False))
    ours = losses(tmp_path / "packed")
    assert len(ours) == 20
    # Rounding grows from step to step, most of all through the state of a delta rule.
    tolerance = 1e-4 if kind == "Qwen3_5MoeText" else 1e-5
    assert ours == pytest.approx(losses(tmp_path / "trl"), rel=tolerance)
    trained = load_run(tmp_path / "packed")
    base = copy.deepcopy(trained.base)
    dequantize_experts(base, torch.float32)
    base.set_experts_implementation("eager")
    plain = PeftModel.from_pretrained(base, trained.folder.adapter).eval()
    merged = merge(load_run(tmp_path / "packed").base, trained.folder.adapter).eval()
    merged.save_pretrained(tmp_path / "merged")
    adapted = trained.with_adapter()
    ids = torch.arange(8, 88).view(4, 20)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        for other in (plain, merged, type(merged).from_pretrained(tmp_path / "merged")):
            logits = other(input_ids=ids).logits
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_loss_that_balances_experts_is_added_only_where_it_is_asked_for(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.run.context import RunContext
    from finetune.run.run import run

    model = packed_model("Qwen3Moe", 600, 1)
    # As some bases are published.
    model.config.output_router_logits = True
    folder = with_tokenizer_of(tiny_base, model, tmp_path / "base")

    def first_loss(name: str, *overrides: str) -> float:
        config = tiny(
            f"model.name_or_path={folder}",
            "dataset.max_length=64",
            "trainer.max_steps=1",
            "trainer.eval_steps=0",
            "trainer.save_steps=0",
            "lora.dropout=0",
            "sample_prompts=[]",
            *overrides,
        )
        run(config, tmp_path / name, RunContext(interactive=False))
        return losses(tmp_path / name)[0]

    packed = first_loss("packed", "trainer.engine=packed")
    trl = first_loss("trl", "trainer.engine=trl")
    balanced = first_loss("balanced", "+trainer.extra.router_aux_loss_coef=0.1")
    assert trl == pytest.approx(packed, rel=1e-5)
    # It is at least 1 for each of a token's experts.
    assert balanced > packed + 0.1
