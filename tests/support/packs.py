"""Banks whose slots are compared with each slot's adapter on a base of its own."""

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.encoding import IGNORED
from finetune.data.types import Prompt
from support.architectures import packed_model
from support.models import load_tokenizer
from support.runs import NONE, Tiny

VOCABULARY = 600
PREFIX = 12
TEXTS = ("Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?")
Row = dict[str, list[int]]


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
        self,
        architecture: str,
        tiny: Tiny,
        *overrides: str,
        load: Callable[[Any, RunConfig], tuple[Any, Any]] | None = None,
    ) -> None:
        """Create the bank.

        Args:
            architecture: A key of `PACKED`.
            tiny: Composes the config.
            overrides: Of the config.
            load: From the model and the config to the bank's base and the reference; None: the
                model without quantization is both.
        """
        import torch

        from finetune.engine.packed.bank import Bank
        from finetune.model.adapter import add_adapter

        self.config = tiny(NONE, "lora.dropout=0", "lora.r=4", *overrides)
        tokenizer = load_tokenizer(self.config)
        base = packed_model(architecture, len(tokenizer), tokenizer.eos_token_id)
        reference = copy.deepcopy(base)
        if load is not None:
            base, reference = load(base, self.config)
        self.bank = Bank(base, self.config)
        self.slots = []
        self.models = []
        for seed in (0, 1):
            slot = self.bank.slots.create(self.config.lora, seed)
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


def answers_of_slots(
    pack: Pack,
    limit: int,
    texts: tuple[str, ...] = TEXTS,
    ends: list[int] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Answers of all slots at once, and what each alone says, token by token without a cache.

    Args:
        pack: The bank.
        limit: Of an answer's tokens.
        texts: Each slot's prompts.
        ends: Ids that end an answer; None: those of the chat template.
    """
    from finetune.engine.encoded_prompts import encode_prompts
    from finetune.engine.packed.requests import Generate

    requests = []
    for slot in pack.slots:
        encoded = encode_prompts(
            pack.bank.base,
            load_tokenizer(pack.config),
            [Prompt(text) for text in texts],
            max_new_tokens=limit,
            max_length=None,
            variables=None,
            sampling=None,
        )
        if ends is not None:
            encoded = dataclasses.replace(encoded, ends=ends)
        requests.append(Generate(slot, encoded))
    alone = []
    for model, request in zip(pack.models, requests, strict=True):
        prompts = request.prompts
        alone.append([greedy(model, ids, limit, prompts.ends) for ids in prompts.ids])
    return pack.bank.generate(requests), alone
