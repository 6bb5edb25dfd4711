"""Tiny base models."""

import json
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_tokenizer_of(base: Path, model: Any, folder: Path) -> Path:
    """A model saved with another base's tokenizer."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def wide_base(tiny_base: Path, folder: Path) -> Path:
    """Copy the tiny base with the shapes of a large model in its config, which a plan reads."""
    place = folder / "wide"
    place.mkdir()
    for file in tiny_base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    config |= {
        "num_hidden_layers": 8,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "head_dim": 1024,
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


Row = dict[str, Any]
SHORT_ROWS = [
    ("What is 1 + 1?", "Two."),
    ("And what would you say is 2 + 2, my friend?", "Four!"),
    ("Sea?", "It is deep and blue and salty."),
]


def load(config: RunConfig) -> Any:
    """Base and adapter as a run has them."""
    from finetune.model.adapter import add_adapter
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    return add_adapter(
        load_base(find_base(config.model), config), config.lora, config.seed
    )


def load_tokenizer(config: RunConfig) -> Any:
    from finetune.model import tokenizer
    from finetune.model.source import find_base

    return tokenizer.load_tokenizer(find_base(config.model), config.model)


def short_tokens(config: RunConfig, tokenizer: Any) -> Any:
    """A few short questions and answers as a run tokenises them."""
    from support.rows import tokenize

    roles = ("user", "assistant")
    rows = [
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(roles, pair, strict=True)
            ]
        }
        for pair in SHORT_ROWS
    ]
    return tokenize("train", rows, tokenizer, config.dataset)


def collate(rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    """A training batch as TRL makes it of tokenised rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch: dict[str, Any] = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id
    )(rows)
    return batch


def trainable(model: Any) -> dict[str, Any]:
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The adapter's gradients of one training step; the weights stay as they are."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: weight.grad.clone() for name, weight in trainable(model).items()}


def wake(model: Any) -> None:
    """Give every B of the adapter values, so that every A has a gradient."""
    import torch

    draw = torch.Generator().manual_seed(1)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.05)


def changed_copy(base: Path, folder: Path, **changes: Any) -> Path:
    """The tiny base with some of its config changed, and other weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    plain = AutoConfig.from_pretrained(base)
    # the width of a head follows from the others
    config = type(plain).from_dict({**plain.to_dict(), "head_dim": None, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
