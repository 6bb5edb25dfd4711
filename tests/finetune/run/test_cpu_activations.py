"""The plan on a CPU: its terms against what autograd allocates, and against whole processes."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.allocations import allocated
from support.scripts import load_script

from finetune.config.paths import CONF
from finetune.config.schema import RunConfig

SCRIPT = CONF.parent / "benchmarks" / "memory_plan.py"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora/target=q_v"],
        ["lora.r=64", "lora.dropout=0.1"],
        ["trainer.gradient_checkpointing=true"],
    ],
)
@pytest.mark.parametrize("vocabulary", [300, 20_000])
@pytest.mark.parametrize(
    "lengths",
    [(180, 150, 90, 300), (2048,), (200, 200, 200)],
    ids=["several lengths", "one row", "one length"],
)
def test_is_what_autograd_allocates(
    tiny: Callable[..., RunConfig],
    overrides: list[str],
    vocabulary: int,
    lengths: tuple[int, ...],
) -> None:
    """Within 10 %. Rows of several lengths are padded by attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.requests import Evaluate, ForwardBackward
    from finetune.run.cpu_activations import cpu_activations

    shapes = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    config = tiny(
        "quantization=none", "trainer.gradient_checkpointing=false", *overrides
    )
    base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shapes))
    bank = Bank(base, config)
    slot = bank.slots.create(config.lora, 0)
    ids = [torch.randint(0, 300, (length,)).tolist() for length in lengths]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    planned = cpu_activations(
        config, base.config, slot.model, [rows], rows, is_trl=False
    )
    training = allocated(
        lambda: bank.forward_backward([ForwardBackward(slot, rows, 0.1, 1)])
    )
    assert training == pytest.approx(planned.single.peak + planned.logits, rel=0.1)
    evaluating = allocated(lambda: bank.evaluate([Evaluate(slot, rows)]))
    # Beyond what the plan adds for logits anyway.
    assert evaluating <= 1.1 * (planned.evaluating + planned.logits)


EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 32, "attn_logit_softcapping": 50.0},
    "Gemma3Text": {"head_dim": 32},
    "Phi3": {"pad_token_id": 1},
    "Olmo2": {},
    "Cohere2": {"logit_scale": 0.5},
    "StableLm": {"qk_layernorm": True},
    "GraniteSWA": {"sliding_window": 64},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "Nemotron": {"head_dim": 32},
    "Qwen3_5Text": {
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2,
    },
    "Qwen3Moe": {**EXPERTS, "head_dim": 32, "num_experts": 16},
    "GptOss": {**EXPERTS, "head_dim": 32, "sliding_window": 64, "num_local_experts": 8},
    "GraniteMoe": {**EXPERTS, "num_local_experts": 16, "intermediate_size": 128},
    "Qwen2Moe": {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 256},
    "Glm4MoeLite": {
        **EXPERTS,
        "num_key_value_heads": 6,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
    },
}


@pytest.mark.parametrize("architecture", list(SHAPES))
def test_is_about_what_autograd_allocates_for_other_architectures(
    architecture: str, tiny: Callable[..., RunConfig]
) -> None:
    """Their layers are not counted one by one: within 15 %, with experts 10 %."""
    import torch
    import transformers

    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.requests import Evaluate, ForwardBackward
    from finetune.run.cpu_activations import cpu_activations

    shapes = {
        "vocab_size": 300,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
    }
    config_class = getattr(transformers, f"{architecture}Config")
    base = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**shapes, **SHAPES[architecture]})
    )
    config = tiny("quantization=none", "trainer.gradient_checkpointing=false")
    bank = Bank(base, config)
    slot = bank.slots.create(config.lora, 0)
    ids = [torch.randint(8, 300, (length,)).tolist() for length in (180, 150, 90, 300)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    planned = cpu_activations(
        config, base.config, slot.model, [rows], rows, is_trl=False
    )
    training = allocated(
        lambda: bank.forward_backward([ForwardBackward(slot, rows, 0.1, 1)])
    )
    is_mixture = "num_experts_per_tok" in SHAPES[architecture]
    within = 0.1 if is_mixture else 0.15
    assert training == pytest.approx(planned.single.peak + planned.logits, rel=within)
    if is_mixture:
        evaluating = allocated(lambda: bank.evaluate([Evaluate(slot, rows)]))
        assert evaluating <= 1.25 * (planned.evaluating + planned.logits)


DIFFERENT = ["nf4_double, r 128, dropout"]
FURTHER = [
    "Adafactor (trl)",
    "Qwen 3, 150,000 words, untied",
    "int8",
    "DoRA (trl)",
    "Qwen 3 with 32 experts (trl)",
    "engine=trl",
    "r 64 with rsLoRA, dropout",
    "no quantization",
    "DoRA",
    "short rows, batch 8, accumulation 2",
    "q_v alone, batch 1",
    "batch 16 of short rows",
    "Qwen 3 with 32 experts",
]
"""By `make test-matrix` alone: each takes a minute or more."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*DIFFERENT, *(pytest.param(name, marks=pytest.mark.matrix) for name in FURTHER)],
)
def test_is_what_a_process_takes(script: ModuleType, tmp_path: Path, name: str) -> None:
    """Within 10 %: the resident memory of a whole run, in a process of its own."""
    planned, measured = script.compare(script.CASES[name], tmp_path)
    assert planned == pytest.approx(measured, rel=0.1)
