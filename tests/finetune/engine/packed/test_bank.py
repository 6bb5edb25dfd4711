"""The packed engine's losses equal TRL's on other architectures, quantizations and schedules."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import (
    NONE,
    SHORT,
    Alone,
    Tiny,
    final,
    losses,
    train_in_slots,
    write_jsonl,
)

from finetune.run.context import RunContext
from finetune.run.run import run


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Architectures by name: their classes' prefix, and what is peculiar to each."""
    return {
        "mistral": ("Mistral", {"sliding_window": 8}),
        "qwen2": (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ),
        "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
        "llama3": (
            "Llama",
            {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
    }


def make_base(name: str, tiny_base: Path, folder: Path) -> Path:
    """A base of two layers whose weights, norms and biases too, are random."""
    import torch
    import transformers

    prefix, peculiar = models()[name]
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**common, **ids, **peculiar)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(models()))
def test_equals_trl_on_other_architectures(
    name: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    """Sliding windows shorter than the rows, biases, norms of queries and keys, layers without
    positions."""
    base = make_base(name, tiny_base, tmp_path / "base")
    for engine in ("trl", "packed"):
        more = (
            f"model.name_or_path={base}",
            NONE,
            "trainer.max_steps=10",
            f"trainer.engine={engine}",
        )
        run(
            tiny(*SHORT, *more, "trainer.per_device_train_batch_size=3"),
            tmp_path / engine,
            RunContext(interactive=False),
        )
    theirs, ours = losses(tmp_path / "trl"), losses(tmp_path / "packed")
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=1e-5)
    there, here = (final(tmp_path / engine)["metrics"] for engine in ("trl", "packed"))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["eval/accuracy"] == there["eval/accuracy"]


@pytest.mark.parametrize(
    "quantization",
    [
        "int8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp4", "nf4_double")),
    ],
)
def test_equals_itself_alone_on_other_quantizations(
    quantization: str, tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    configs = [
        tiny(
            *SHORT,
            f"quantization={quantization}",
            f"seed={seed}",
            f"lora.dropout={seed / 10}",
        )
        for seed in range(3)
    ]
    for config, place in zip(
        configs, train_in_slots(configs, tmp_path, 3), strict=True
    ):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)


@pytest.mark.parametrize(
    "quantization",
    ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "int8"))],
)
def test_recomputed_activations_give_the_same_losses(
    quantization: str, tiny: Tiny, tmp_path: Path
) -> None:
    found = []
    for checkpointing in ("true", "false"):
        more = (
            f"trainer.gradient_checkpointing={checkpointing}",
            f"quantization={quantization}",
            "lora.dropout=0.2",
        )
        configs = [tiny(*SHORT, *more, f"seed={seed}") for seed in range(2)]
        found.append(
            [
                losses(place)
                for place in train_in_slots(configs, tmp_path / checkpointing, 2)
            ]
        )
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_rows_that_begin_alike_equal_trl(tiny: Tiny, tmp_path: Path) -> None:
    """The same question in all rows, and answers that begin alike: of these no token may go
    missing."""
    answers = [f"The answer is {'so ' * (number % 5)}{number}." for number in range(30)]
    question = "What is the meaning of this rather long question, which all the rows have in common?"
    rows = [{"prompt": question, "completion": answer} for answer in answers]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = (f"dataset.path={data}", "dataset.eval_fraction=0.2")
    for engine in ("trl", "packed"):
        more = (
            *held_out,
            NONE,
            "trainer.per_device_train_batch_size=4",
            f"trainer.engine={engine}",
        )
        run(
            tiny(*SHORT, *more, "trainer.max_steps=10"),
            tmp_path / engine,
            RunContext(interactive=False),
        )
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
    there, here = (final(tmp_path / engine)["metrics"] for engine in ("trl", "packed"))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["eval/accuracy"] == there["eval/accuracy"]


SCHEDULES = [
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_trls(schedule: str, tiny: Tiny, tmp_path: Path) -> None:
    kwargs = {
        "cosine_with_min_lr": "{min_lr_rate:0.1}",
        "warmup_stable_decay": "{num_decay_steps:3}",
    }
    given = (
        [f"++trainer.extra.lr_scheduler_kwargs={kwargs[schedule]}"]
        if schedule in kwargs
        else []
    )
    rates = []
    for engine in ("trl", "packed"):
        more = (
            f"optimizer.lr_scheduler_type={schedule}",
            "optimizer.warmup_ratio=0.25",
            f"trainer.engine={engine}",
        )
        run(
            tiny(*SHORT, *more, *given, "trainer.max_steps=9"),
            tmp_path / engine,
            RunContext(interactive=False),
        )
        rows = [
            json.loads(line)
            for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()
        ]
        rates.append(
            [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
        )
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    assert len(rates[1]) == 9
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
