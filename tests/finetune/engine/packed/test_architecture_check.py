"""The check of a small base: what it lets through, what it refuses and why, and its record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import (
    ARCHITECTURES,
    EXPERTS,
    PACKED,
    TINY,
    packed_model,
)
from support.configs import tiny_overrides

pytestmark = [
    pytest.mark.usefixtures("fresh_cache"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def no_memory() -> None:
    """Forget what other tests have checked."""
    from finetune.engine import packed_support

    packed_support._recorded_support.cache_clear()


def support(architecture: str, **changes: Any) -> Any:
    import transformers

    from finetune.engine.packed_support import packed_support

    sizes = {**ARCHITECTURES, **PACKED}.get(architecture, TINY)
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **changes})
    return packed_support(config)


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "SmolLM3": {},
    "Gemma2": {},
    "Gemma3Text": {},
    "Gemma4Text": {"num_kv_shared_layers": 18, "final_logit_softcapping": 30.0},
    "Phi3": {},
    "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "Ministral3": {},
    "Olmo2": {},
    "Olmo3": {},
    "Glm4": {},
    "Cohere2": {},
    "Ernie4_5": {},
    "HunYuanDenseV1": {"head_dim": 128},
    "Exaone4": {},
    "Starcoder2": {},
    "StableLm": {},
    "Nemotron": {"num_key_value_heads": 8},
    "GPTNeoX": {},
    "Helium": {},
    "Qwen3_5Text": {},
    "Lfm2": {"layer_types": ["conv"] * 2 + ["full_attention"] + ["conv"] * 29},
    "Qwen3Moe": {},
    "GptOss": {},
    "GraniteMoe": {},
    "GraniteMoeHybrid": {
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_n_heads": 48,
        "num_hidden_layers": 40,
        "layer_types": (["linear_attention"] * 9 + ["full_attention"]) * 4,
    },
    "Glm4MoeLite": {},
    "Mixtral": {},
    "Qwen2Moe": {},
    "Qwen3Next": {},
    "Olmoe": {},
    "DeepseekV3": {},
    "FalconH1": {},
    "FalconH1 of 0.5B": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
    },
    "Jamba": {},
    "Gemma3nText": {},
    "Qwen3_5MoeText": {},
    "Gemma4Text with experts": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "final_logit_softcapping": 30.0,
    },
}


@pytest.mark.parametrize("architecture", list(PUBLISHED))
def test_bases_of_published_sizes_pass(architecture: str) -> None:
    """Their config's defaults are the sizes of a published base."""
    import transformers

    from finetune.engine.packed_support import packed_support
    from finetune.model.layer_kinds import config_with_few_layers
    from finetune.model.small_config import narrow_config

    config_class = getattr(transformers, f"{architecture.split()[0]}Config")
    config = config_class(**PUBLISHED[architecture])
    before = config.to_json_string(use_diff=False)
    small = config_with_few_layers(narrow_config(config))
    assert config.to_json_string(use_diff=False) == before
    assert small.num_hidden_layers <= 6
    assert set(getattr(small, "layer_types", None) or []) == set(
        getattr(config, "layer_types", None) or []
    )
    assert module_classes(small) == module_classes(config)
    result = packed_support(config)
    assert (result.refusal, result.answers_together) == (None, True)


@pytest.mark.parametrize("architecture", ["NemotronH", "FalconH1"])
def test_a_base_with_layers_that_peft_refuses_passes(architecture: str) -> None:
    """Adapters of the check are on the layers that `all-linear` stands for."""
    import transformers

    from finetune.engine.packed_support import packed_support

    config = getattr(transformers, f"{architecture}Config")()
    assert packed_support(config).refusal is None


def module_classes(config: Any) -> set[type]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("Llama", 2),  # all layers are of the same kind
        ("Gemma3Text", 2),  # layers are listed
        ("DeepseekV3", 4),  # the first three have no experts
        ("Jamba", 5),  # the fifth of eight layers has attention
        ("RecurrentGemma", 3),  # the third of three
        ("LongcatFlash", 2),  # a block is two layers in the config
        ("NemotronH", 4),  # their number follows from their list
    ],
)
def test_a_small_base_has_no_more_layers_than_its_kinds_need(
    architecture: str, layers: int
) -> None:
    import transformers

    from finetune.model.layer_kinds import config_with_few_layers
    from finetune.model.small_config import layer_count, narrow_config

    config = getattr(transformers, f"{architecture}Config")()
    small = config_with_few_layers(narrow_config(config))
    assert layer_count(small) == layers
    assert module_classes(small) == module_classes(config)


def test_a_base_whose_first_layers_lack_a_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kind that follows from the number of all layers."""
    import torch
    from transformers.models.llama import modeling_llama

    class Block(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            if config.num_hidden_layers == 8:
                self.norm = torch.nn.LayerNorm(config.hidden_size)

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Block)
    refusal = support("Llama", num_hidden_layers=8).refusal
    assert refusal == "no small base to try it on (fewer layers lack kinds of layers)"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no attention": ("Mamba", {}, "no attention heads"),
    "experts": ("Llama4Text", EXPERTS, "experts that its own code alone computes"),
    "alibi": ("Bloom", {}, ""),
    "transposed layers": ("GPT2", {"resid_pdrop": 0, "attn_pdrop": 0}, "Conv1D"),
    "both directions": ("Gemma3Text", {"use_bidirectional_attention": True}, ""),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_it_can_not_compute_is_refused_with_the_reason(case: str) -> None:
    architecture, changes, reason = REFUSED[case]
    refusal = support(architecture, **changes).refusal
    assert refusal is not None
    assert reason in refusal
    assert "\n" not in refusal


BROKEN: dict[str, tuple[str, str, str, Any]] = {
    "scale of logits": (
        "Granite",
        "finetune.model.architectures",
        "LOGIT_DIVISORS",
        (),
    ),
    "cap of logits": ("Gemma2", "finetune.model.architectures", "LOGIT_CAPS", ()),
    "rows of a recurrence": (
        "Lfm2",
        "finetune.engine.packed.autograd_backend",
        "recurrent_layers",
        lambda _: [],
    ),
    "norms by 1 + w": (
        "Gemma3Text",
        "finetune.engine.packed.fused_layers",
        "_is_equal",
        lambda *_: True,
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_description_that_leaves_something_out_is_found(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, module, name, value = BROKEN[case]
    monkeypatch.setattr(f"{module}.{name}", value)
    refusal = support(architecture).refusal
    assert refusal is not None
    assert "differ by" in refusal


@pytest.mark.parametrize("feature", ["sliding_window", "softcap", "s_aux", "scaling"])
def test_attention_that_leaves_something_out_is_found(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface

    from finetune.engine.packed import attention

    def forgetful(*arguments: Any, **named: Any) -> Any:
        named.pop(feature, None)
        return attention._attention(*arguments, **named)

    architecture = {"s_aux": "GraniteSWA", "scaling": "Granite"}.get(feature, "Gemma2")
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", forgetful)
    refusal = support(architecture).refusal
    assert refusal is not None
    assert "differ by" in refusal


def test_an_argument_of_attention_that_is_not_known_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AttentionInterface

    from finetune.engine.packed import attention

    def with_more(*arguments: Any, **named: Any) -> Any:
        return attention._attention(*arguments, **named, position_bias=1)

    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", with_more)
    assert support("Llama").refusal == "attention with position_bias"


def test_a_record_is_read_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine import check_record, packed_support
    from finetune.engine.packed import architecture_check

    calls = []
    check: Callable[..., Any] = architecture_check.check_architecture

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return check(*arguments)

    monkeypatch.setattr(architecture_check, "check_architecture", count)
    for hidden_size in (64, 128):  # of the same kind
        result = support("Llama", hidden_size=hidden_size, head_dim=16)
        assert result.refusal is None
    assert calls == [1]
    packed_support._recorded_support.cache_clear()
    support("Llama", head_dim=16)
    assert calls == [1]
    (record,) = (tmp_path / "cache" / "architectures").iterdir()
    assert json.loads(record.read_text()) == {
        "model_type": "llama",
        "refusal": None,
        "answers_together": True,
    }
    monkeypatch.setattr(check_record, "version", lambda _: "another")
    packed_support._recorded_support.cache_clear()
    support("Llama", head_dim=16)
    assert calls == [1, 1]


def test_a_refusal_is_recorded_too(tmp_path: Path) -> None:
    assert support("Bloom").refusal is not None
    (record,) = (tmp_path / "cache" / "architectures").iterdir()
    assert json.loads(record.read_text())["refusal"]


def test_the_plan_says_that_prompts_are_answered_one_after_another(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where padding on the left changes an answer, as the small base shows."""
    import torch

    from finetune.engine import packed_support
    from finetune.engine.packed import architecture_check
    from finetune.plan import main

    def compare(*_: Any) -> Any:
        return torch.ones(1, 4), torch.zeros(1, 4) + 2

    monkeypatch.setattr("sys.argv", ["plan", *tiny_overrides(tiny_base)])
    main()
    assert "one prompt after another" not in capsys.readouterr().out
    monkeypatch.setattr(architecture_check, "compare_steps", compare)
    monkeypatch.setattr(packed_support, "CHECK_VERSION", -1)
    packed_support._recorded_support.cache_clear()
    main()
    assert "one prompt after another, in slots too" in capsys.readouterr().out


def test_the_check_leaves_the_random_state_as_it_was() -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    support("Llama")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_norms_and_gates_of_llamas_kind_are_fused(architecture: str) -> None:
    assert fused(architecture) == {"norms": True, "gates": True}


@pytest.mark.parametrize(
    ("architecture", "norms", "gates"),
    [
        ("Gemma3Text", True, True),
        ("Phi3", True, True),
        ("Olmo2", True, True),
        ("Nemotron", False, False),
        ("GPTNeoX", False, False),
        ("Cohere2", False, True),
    ],
)
def test_layers_are_fused_where_a_form_is_equal_to_them(
    architecture: str, norms: bool, gates: bool
) -> None:
    assert fused(architecture) == {"norms": norms, "gates": gates}


def fused(architecture: str) -> dict[str, bool]:
    """Whether the layers of a base are computed otherwise within passes."""
    from finetune.engine.packed.fused_layers import fuse_layers

    base = packed_model(architecture, 600, 1)
    fuse_layers(base, lambda: True)
    found = {"norms": False, "gates": False}
    for module in base.modules():
        if "forward" in vars(module):
            kind = "norms" if "Norm" in type(module).__name__ else "gates"
            found[kind] = True
    return found


@pytest.mark.parametrize(
    "architecture", ["Llama", "Gemma3Text", "Phi3", "Olmo2", "Helium"]
)
def test_fused_layers_have_the_gradients_of_the_bases_own_code(
    architecture: str,
) -> None:
    import torch

    from finetune.engine.packed.fused_layers import fuse_layers

    base = packed_model(architecture, 600, 1)
    active = False
    fuse_layers(base, lambda: active)
    layers = [module for module in base.modules() if "forward" in vars(module)]
    assert layers
    for layer in layers:
        weight = getattr(layer, "weight", None)
        x = torch.randn(1, 5, 64 if weight is None else len(weight), requires_grad=True)
        active = False
        own = layer(x)
        slope = torch.randn_like(own)
        (expected,) = torch.autograd.grad(own, x, slope)
        active = True
        (gradient,) = torch.autograd.grad(layer(x), x, slope)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
