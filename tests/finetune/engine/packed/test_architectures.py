"""Architectures in the packed engine: each row alone, by the base's own code and PEFT, is the
reference."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from support.architectures import PACKED, packed_model
from support.models import load_tokenizer, with_tokenizer_of
from support.runs import NONE, Tiny, losses

from finetune.data.encoding import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 600
PREFIX = 12
Row = dict[str, list[int]]

BY_DEFAULT = {
    "Llama", "Gemma2", "Gemma3Text", "Gemma4Text", "Phi3", "Granite", "Cohere2", "GPTNeoX",
    "GraniteSWA", "Qwen3_5Text", "Lfm2", "MiniCPM3",
}  # fmt: skip
"""One of each kind: caps, scalars, shared keys, fused layers, sinks, recurrences, values of another
width."""

architectures = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
        for name in PACKED
    ],
)


def rows_that_begin_alike(seed: int, count: int = 3) -> list[Row]:
    """Rows of different lengths, all longer than the windows."""
    draw = random.Random(seed)
    prefix = [draw.randrange(2, VOCABULARY) for _ in range(PREFIX)]
    rows = []
    for number in range(count):
        ids = [draw.randrange(2, VOCABULARY) for _ in range(8 + 5 * number)]
        labels = [IGNORED] * (PREFIX + 2) + ids[2:]
        rows.append({"input_ids": prefix + ids, "labels": labels})
    return rows


def own_loss(model: Any, row: Row) -> Any:
    """The summed loss of a row alone, by the model's own forward."""
    import torch

    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[0, :-1],
        torch.tensor(row["labels"][1:]),
        ignore_index=IGNORED,
        reduction="sum",
    )


class Pack:
    """A bank with two slots whose adapters differ, and each slot's adapter on a base of its own."""

    def __init__(
        self, architecture: str, tiny: Tiny, tiny_base: Path, *overrides: str
    ) -> None:
        import torch

        from finetune.engine.packed.bank import Bank
        from finetune.model.adapter import add_adapter

        self.config = tiny(NONE, "lora.dropout=0", "lora.r=4", *overrides)
        tokenizer = load_tokenizer(self.config)
        base = packed_model(architecture, len(tokenizer), tokenizer.eos_token_id)
        reference = copy.deepcopy(base)
        self.bank = Bank(base, self.config)
        self.slots = []
        self.models = []
        for seed in (0, 1):
            slot = self.bank.create_slot(self.config.lora, seed)
            generator = torch.Generator().manual_seed(seed)
            slot.vector.copy_(torch.randn(slot.vector.shape, generator=generator) * 0.1)
            model = add_adapter(copy.deepcopy(reference), self.config.lora, seed)
            values = dict(slot.model.named_parameters())
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.data.copy_(values[name].data)
            self.slots.append(slot)
            self.models.append(model.eval())

    def train(self, batches: list[list[Row]], step: int = 0) -> list[float]:
        """The losses of a batch of each slot; the gradients are in the slots."""
        from finetune.engine.packed.requests import ForwardBackward

        requests = [
            ForwardBackward(slot, rows, 0.5, step)
            for slot, rows in zip(self.slots, batches, strict=False)
        ]
        return [result.loss for result in self.bank.forward_backward(requests)]

    def row_losses(self, batches: list[list[Row]]) -> list[tuple[float, ...]]:
        from finetune.engine.packed.requests import Evaluate

        requests = [
            Evaluate(slot, rows)
            for slot, rows in zip(self.slots, batches, strict=False)
        ]
        return [each.row_losses for each in self.bank.evaluate(requests)]


BATCHES = [rows_that_begin_alike(0), rows_that_begin_alike(1, 2)]


def share_of_difference(computed: Any, expected: Any) -> float:
    return float((computed - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@architectures
def test_a_packed_batch_is_each_row_alone_by_the_bases_own_code(
    architecture: str, checkpointing: str, tiny: Tiny, tiny_base: Path
) -> None:
    import torch

    setting = f"trainer.gradient_checkpointing={checkpointing}"
    pack = Pack(architecture, tiny, tiny_base, setting)
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
def test_rows_and_slots_do_not_see_each_other(
    architecture: str, tiny: Tiny, tiny_base: Path
) -> None:
    """A row is changed in the middle of a batch: only its own loss changes."""
    pack = Pack(architecture, tiny, tiny_base, "lora.dropout=0.3")
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
    architecture: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.model.adapter import save_adapter

    pack = Pack(architecture, tiny, tiny_base)
    pack.bank.base.save_pretrained(tmp_path / "base")
    slot = pack.slots[1]
    save_adapter(slot.model, load_tokenizer(pack.config), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([BATCHES[1][0]["input_ids"]])
    with torch.no_grad(), pack.bank._autograd.adapted_rows([slot]) as adapted:
        ours = adapted.eval()(input_ids=ids, use_cache=False).logits
        theirs = plain(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    # Of its losses in training too, not those of generation alone.
    expected = [float(own_loss(plain, row)) for row in BATCHES[1]]
    assert pack.row_losses(BATCHES)[1] == pytest.approx(expected, rel=1e-4)


@architectures
def test_answers_and_label_likelihoods_in_slots_are_those_of_each_alone(
    architecture: str, tiny: Tiny, tiny_base: Path
) -> None:
    from finetune.data.types import Prompt
    from finetune.engine.encoded_prompts import encode_prompts
    from finetune.engine.packed.requests import Evaluate, Generate

    pack = Pack(architecture, tiny, tiny_base)
    tokenizer = load_tokenizer(pack.config)
    texts = ("Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?")
    requests = []
    for slot in pack.slots:
        encoded = encode_prompts(
            pack.bank.base,
            tokenizer,
            [Prompt(text) for text in texts],
            max_new_tokens=24,
            max_length=None,
            variables=None,
            sampling=None,
        )
        requests.append(Generate(slot, encoded))
    together = pack.bank.generate(requests)
    for number, request in enumerate(requests):
        model = pack.models[number]
        for ids, answer in zip(request.prompts.ids, together[number], strict=True):
            assert answer == greedy(model, ids, 24, request.prompts.ends)
    # Groups of two rows that begin alike, as a row has them with each of its labels.
    groups = [row for seed in (3, 4) for row in rows_that_begin_alike(seed, 2)]
    likelihoods = pack.bank.evaluate(
        [Evaluate(slot, groups, group_size=2) for slot in pack.slots]
    )
    for model, evaluation in zip(pack.models, likelihoods, strict=True):
        expected = [float(own_loss(model, row)) for row in groups]
        assert evaluation.row_losses == pytest.approx(expected, rel=1e-5)


def greedy(model: Any, ids: list[int], tokens: int, ends: list[int]) -> list[int]:
    """The most likely answer, each token by a plain forward pass."""
    import torch

    answer: list[int] = []
    while len(answer) < tokens and answer[-1:] not in [[end] for end in ends]:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([ids + answer]), use_cache=False
            ).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


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
    assert plan.activations > 0
    assert plan.base > 0


@pytest.mark.slow
@architectures
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
