"""Mixtures of experts in 4 bits: loading, products, adapters, merging."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import packed_model
from support.bases import quantized_base
from support.models import with_tokenizer_of
from support.runs import NONE, SHORT, Tiny

from finetune.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "Qwen3Moe": "mlp.experts",
    "GptOss": "mlp.experts",
    "GraniteMoe": "block_sparse_moe.experts",
    "Glm4MoeLite": "mlp.experts",
    "Mixtral": "mlp.experts",
}
"""Architecture: where its layers have their experts."""

kinds = pytest.mark.parametrize("kind", list(KINDS))
quantizations = pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "fp4"])


@pytest.fixture(autouse=True)
def keep_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny bases would be dequantised as a whole."""
    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0.0)


@pytest.fixture(scope="module")
def bases(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny base of a kind."""
    folders: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind) / "base"
            folders[kind] = with_tokenizer_of(
                tiny_base, packed_model(kind, 600, 1), folder
            )
        return folders[kind]

    return base


def load(tiny: Tiny, folder: Path, *overrides: str) -> Any:
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny(f"model.name_or_path={folder}", *overrides)
    return load_base(find_base(config.model), config).eval()


def experts_of(model: Any) -> list[tuple[Any, str]]:
    from finetune.model.experts import expert_modules, weight_names

    return [
        (experts, name)
        for experts in expert_modules(model).values()
        for name in weight_names(experts)
    ]


def dense(model: Any) -> Any:
    """A copy of a base whose experts are dequantised and computed by its own code."""
    import torch

    from finetune.model.experts import dequantize_experts

    reference = copy.deepcopy(model)
    dequantize_experts(reference, torch.float32)
    reference.set_experts_implementation("eager")
    return reference


def logits_and_gradient(model: Any) -> tuple[Any, Any]:
    """Of a batch of embeddings, and of the sum of the logits' squares."""
    import torch

    ids = torch.arange(8, 88).view(4, 20)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), embeddings.grad


@kinds
@quantizations
def test_experts_are_quantised_as_bitsandbytes_does(
    kind: str, quantization: str, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from finetune.model.experts import BLOCK, ExpertWeight

    model = load(tiny, bases(kind), f"quantization={quantization}")
    plain = load(tiny, bases(kind), "quantization=none")
    weights = experts_of(model)
    assert weights
    for (experts, name), (plain_experts, _) in zip(
        weights, experts_of(plain), strict=True
    ):
        weight = getattr(experts, name)
        assert weight.dtype == torch.uint8
        assert weight.numel() * 2 == getattr(plain_experts, name).numel()
        original = getattr(plain_experts, name).data
        expected, state = quantize_4bit(
            original,
            compress_statistics=quantization == "nf4_double",
            quant_type=quantization[:3],
        )
        assert torch.equal(weight.data, expected)
        assert torch.equal(weight.quant_state.absmax, state.absmax)
        dense = ExpertWeight(experts, name).dense()
        # Of other widths bitsandbytes' own values are wrong on a CPU.
        if dense.shape[-1] % BLOCK == 0:
            assert torch.equal(dense, dequantize_4bit(expected, state))
        # As far from the original as 4 bits are from random weights.
        assert (dense - original).norm() < 0.15 * original.norm()


@kinds
@quantizations
def test_products_are_those_of_the_bases_own_code_with_the_dequantised_weights(
    kind: str,
    quantization: str,
    bases: Callable[[str], Path],
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    model = load(tiny, bases(kind), f"quantization={quantization}")
    expected, expected_gradient = logits_and_gradient(dense(model))
    # All experts at once, and one after another.
    for size in (2**27, 1):
        monkeypatch.setattr("finetune.model.experts.DENSE_BYTES", size)
        logits, gradient = logits_and_gradient(model)
        assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
        difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert difference < 1e-5


def test_layers_that_bitsandbytes_dequantises_wrongly_on_a_cpu_stay_as_they_are(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their rows end within a block of weights with a common scale."""
    import torch
    import transformers

    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=600, intermediate_size=160, eos_token_id=1, pad_token_id=1, **shape
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = with_tokenizer_of(tiny_base, model, tmp_path / "base")
    with caplog.at_level("INFO"):
        loaded = load(tiny, folder, "quantization=nf4")
    mlp = loaded.model.layers[0].mlp
    assert type(mlp.down_proj) is torch.nn.Linear
    assert "1 linear layers stay in float32" in caplog.text
    x = torch.randn(3, 64)
    expected = model.model.layers[0].mlp.up_proj(x)
    with torch.no_grad():
        assert (mlp.up_proj(x) - expected).norm() < 0.15 * expected.norm()
    # Files that have them in 4 bits already are refused.
    quantized = quantized_base(folder, tmp_path / "quantized", load_in_4bit=True)
    with pytest.raises(ConfigError, match="160 inputs wrongly on a CPU; allowed here"):
        load(tiny, quantized, "quantization=none")


def test_only_experts_with_tokens_are_dequantised(
    bases: Callable[[str], Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetune.model.experts import ExpertWeight

    model = load(tiny, bases("Qwen3Moe"), "quantization=nf4")
    counts = []
    method = ExpertWeight._dequantize

    def dequantize(self: ExpertWeight, chunk: Any) -> Any:
        counts.append(len(chunk))
        return method(self, chunk)

    monkeypatch.setattr(ExpertWeight, "_dequantize", dequantize)
    with torch.no_grad():
        model(input_ids=torch.tensor([[9]]))
    # One layer of two has experts, each token two of four.
    assert counts == [2, 2]


def test_no_more_than_one_tensor_of_experts_is_dense_while_a_base_loads(
    bases: Callable[[str], Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers hands each one over when it is complete, and gets it quantised."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    seen = []
    method = Bnb4bitQuantize.convert

    def convert(
        self: Any, values: dict[str, Any], *arguments: Any, **named: Any
    ) -> Any:
        seen.append((list(values), [getattr(v, "ndim", None) for v in values.values()]))
        result = method(self, values, *arguments, **named)
        assert all(value.dtype.itemsize == 1 for value in result.values())
        return result

    monkeypatch.setattr(Bnb4bitQuantize, "convert", convert)
    load(tiny, bases("Qwen3Moe"), "quantization=nf4")
    experts = [names for names, _ in seen if "experts" in names[0]]
    assert len(experts) == 2
    assert all(len(names) == 1 for names in experts)


@kinds
def test_the_base_as_it_trains_on_a_cpu_has_the_same_numbers_in_4_bits_and_dense(
    kind: str,
    bases: Callable[[str], Path],
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from finetune.model.quantization import dequantize_base

    config = tiny(f"model.name_or_path={bases(kind)}", "quantization=nf4")
    model = load(tiny, bases(kind), "quantization=nf4")
    expected, _ = logits_and_gradient(model)
    dequantize_base(model, config)
    assert all(hasattr(getattr(*each), "quant_state") for each in experts_of(model))
    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0.25)
    dequantize_base(model, config)
    assert not any(hasattr(getattr(*each), "quant_state") for each in experts_of(model))
    logits, _ = logits_and_gradient(model)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_quantised_base_with_experts_can_not_be_saved_by_mistake(
    bases: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    model = load(tiny, bases("Qwen3Moe"), "quantization=nf4")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


ALL_LINEAR = {
    "Qwen3Moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "GptOss": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "GraniteMoe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "Mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "Glm4MoeLite": {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"
    },
    "Qwen2Moe": {
        "q_proj", "k_proj", "v_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj", "shared_expert_gate",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ALL_LINEAR))
def test_all_linear_adapts_neither_experts_nor_routers(
    kind: str, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    from finetune.model.adapter import add_adapter

    config = tiny(f"model.name_or_path={bases(kind)}", "lora=r16", NONE)
    model = add_adapter(load(tiny, bases(kind), NONE), config.lora, 0)
    adapted = {
        name.rsplit(".lora_A", 1)[0].rsplit(".", 1)[-1]
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_A" in name
    }
    assert adapted == ALL_LINEAR[kind]


def test_a_pattern_adapts_the_layers_that_it_matches_and_no_experts(
    bases: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    """PEFT would take `down_proj` for all experts."""
    from peft import PeftModel
    from support.models import load_tokenizer

    from finetune.model.adapter import add_adapter, save_adapter

    config = tiny("lora=r8", 'lora.target_modules=".*layers\\.0.*_proj"')
    assert isinstance(config.lora.target_modules, str)
    model = add_adapter(load(tiny, bases("Qwen3Moe"), NONE), config.lora, 0)

    def adapted(model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if "lora_A" in name]

    names = adapted(model)
    assert len(names) == 4
    assert all(".layers.0.self_attn." in name for name in names)
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    base = load(tiny, bases("Qwen3Moe"), NONE)
    assert adapted(PeftModel.from_pretrained(base, tmp_path / "adapter")) == names


@pytest.fixture
def gemma4(tiny_base: Path, tmp_path: Path) -> Path:
    """A base whose routers are linear layers."""
    import torch
    import transformers

    config = transformers.Gemma4TextConfig(
        vocab_size=600,
        vocab_size_per_layer_input=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return with_tokenizer_of(tiny_base, model, tmp_path / "base")


@pytest.mark.parametrize(
    "exclusion",
    [None, "null", "[]", "[o_proj]", r"'(?i).*\.(O)_proj'"],
)
def test_routers_that_are_linear_layers_are_neither_adapted_nor_quantised(
    tiny: Tiny, gemma4: Path, exclusion: str | None
) -> None:
    """Whatever else the config leaves out."""
    import torch

    from finetune.model.adapter import add_adapter
    from finetune.model.experts import router_layers

    loaded = load(tiny, gemma4, "quantization=nf4")
    routers = router_layers(loaded)
    assert len(routers) == 2
    assert all(type(loaded.get_submodule(each)) is torch.nn.Linear for each in routers)
    extra = [] if exclusion is None else [f"+lora.extra.exclude_modules={exclusion}"]
    lora = tiny("lora=r16", *extra).lora
    adapted = add_adapter(loaded, lora, 0)
    names = [name for name, w in adapted.named_parameters() if w.requires_grad]
    assert any("q_proj" in name for name in names)
    assert not any("router" in name for name in names)
    excludes_outputs = "_proj" in (exclusion or "")
    assert any("o_proj" in name for name in names) is not excludes_outputs


@pytest.fixture
def mxfp4(tiny_base: Path, tmp_path: Path) -> Path:
    """A gpt-oss as it is published: its experts in MXFP4."""
    import torch
    from safetensors.torch import load_file, save_file

    model = packed_model("GptOss", 600, 1)
    folder = with_tokenizer_of(tiny_base, model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = (experts, outputs, inputs // 32, 16)
        weights[f"{name}_blocks"] = torch.randint(
            256, blocks, dtype=torch.uint8, generator=generator
        )
        weights[f"{name}_scales"] = torch.randint(
            122, 126, blocks[:3], dtype=torch.uint8, generator=generator
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_in_mxfp4_are_quantised_again(mxfp4: Path, tiny: Tiny) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    from finetune.model.experts import ExpertWeight

    quantized = load(tiny, mxfp4, "quantization=nf4")
    dense = load(tiny, mxfp4, "quantization=none")
    assert len(experts_of(quantized)) == 4
    for (experts, name), (plain, _) in zip(
        experts_of(quantized), experts_of(dense), strict=True
    ):
        original = getattr(plain, name).data.float()
        assert original.std() > 0.1
        expected, _ = quantize_4bit(original, quant_type="nf4")
        assert torch.equal(getattr(experts, name).data, expected)
        values = ExpertWeight(experts, name).dense()
        assert (values - original).norm() < 0.15 * original.norm()
    # Its linear layers are quantised as those of another base.
    assert hasattr(quantized.model.layers[0].self_attn.q_proj.weight, "quant_state")


@pytest.mark.slow
def test_a_run_on_mxfp4_records_how_it_was_quantised(
    mxfp4: Path, tiny: Tiny, tmp_path: Path
) -> None:
    from finetune.run.load import load_run
    from finetune.run.run import run

    name = f"model.name_or_path={mxfp4}"
    run(tiny(*SHORT, name, "quantization=nf4", "lora=r8"), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["engine"] == "packed"
    assert result["quantization"] == "nf4"
    model = load_run(tmp_path / "run").with_adapter()
    assert len(experts_of(model)) == 4


BOTH = "[experts.gate_up_proj,experts.down_proj]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora.extra.target_parameters=[experts.w1]",
            "lora.extra.target_parameters=experts.w1: matches no weight of experts; allowed: "
            "mlp.experts.down_proj, mlp.experts.gate_up_proj",
        ),
        (
            f"lora.extra.target_parameters={BOTH}",
            "lora.dropout=0.1: must be 0 with adapters on experts",
        ),
        (
            "lora.target_modules=[gate_proj]",
            "lora.target_modules=gate_proj: ",
        ),
    ],
)
def test_targets_that_can_not_be_adapted_are_refused_before_the_base_loads(
    override: str, message: str, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    from finetune.model.source import find_base
    from finetune.model.target_modules import check_targets

    name = f"model.name_or_path={bases('Qwen3Moe')}"
    config = tiny(
        name, "lora.dropout=0.1", f"+{override}" if "extra" in override else override
    )
    with pytest.raises(ConfigError) as error:
        check_targets(find_base(config.model), config.model, config.lora)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def trained(
    kind: str, bases: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> Path:
    """A run on a base in 4 bits, with adapters on experts."""
    from finetune.run.run import run

    config = tiny(
        *SHORT,
        f"model.name_or_path={bases(kind)}",
        "quantization=nf4",
        "optimizer.learning_rate=0.01",
        "trainer.max_steps=4",
        "lora.dropout=0",
        f"+lora.extra.target_parameters={BOTH}",
    )
    run(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_adapters_on_experts_are_pefts(
    kind: str, trained: Path, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    """They train in 4 bits, load in plain PEFT with equal logits, and can be merged."""
    import torch
    from peft import PeftModel

    from finetune.run.load import load_run
    from finetune.run.merging import merge

    assert json.loads((trained / "result.json").read_text())["engine"] == "trl"
    ids = torch.arange(8, 88).view(4, 20)
    base = load_run(trained).base
    plain = PeftModel.from_pretrained(dense(base), trained / "adapter").eval()
    ours = load_run(trained).with_adapter()
    merged = merge(load_run(trained).base, trained / "adapter").eval()
    assert any(
        "experts" in name for name, _ in ours.named_parameters() if "lora" in name
    )
    with torch.no_grad():
        without = base(input_ids=ids).logits
        logits = ours(input_ids=ids).logits
        assert (logits - without).abs().max() > 0.01
        for other in (plain, merged):
            assert torch.allclose(
                other(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_adapters_on_experts_have_the_gradients_of_pefts(
    kind: str, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    import torch
    from peft import get_peft_model

    from finetune.model.adapter import add_adapter
    from finetune.model.lora_config import lora_config

    targets = f"+lora.extra.target_parameters={BOTH}"
    lora = tiny(
        "lora=r8", "lora.dropout=0", "lora.target_modules=[q_proj]", targets
    ).lora
    base = load(tiny, bases(kind), "quantization=nf4")
    reference = get_peft_model(dense(base), lora_config(lora))
    reference.get_base_model().set_experts_implementation("grouped_mm")
    model = add_adapter(base, lora, 0)
    torch.manual_seed(1)
    values = dict(reference.named_parameters())
    trained = [name for name, w in model.named_parameters() if w.requires_grad]
    assert sum("experts" in name for name in trained) >= 4
    for name in trained:
        weight = model.get_parameter(name)
        weight.data = 0.1 * torch.randn_like(weight)
        values[name].data = weight.data.clone()
    for each in (model, reference):
        each(input_ids=torch.arange(8, 88).view(4, 20)).logits.square().sum().backward()
    for name in trained:
        gradient, expected = model.get_parameter(name).grad, values[name].grad
        assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("chunk", [[0], [1, 2], [0, 3, 5], list(range(6))])
def test_some_experts_are_dequantised_as_all_are(chunk: list[int]) -> None:
    """Their scales are quantised in blocks that begin within an expert."""
    from types import SimpleNamespace

    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    from finetune.model.experts import ExpertWeight

    values = torch.randn(6, 128, 192) * torch.arange(1, 7).view(6, 1, 1)
    weight = Params4bit(values, quant_type="nf4").to("cpu")
    experts: Any = SimpleNamespace(
        down_proj=weight, is_transposed=False, has_bias=False
    )
    expected = dequantize_4bit(weight.data, weight.quant_state)
    matrices = ExpertWeight(experts, "down_proj")._dequantize(chunk)
    assert torch.equal(matrices, expected[chunk])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_products_on_a_gpu_are_those_of_the_dequantised_weights(
    kind: str, bases: Callable[[str], Path], tiny: Tiny
) -> None:
    """In bfloat16 by PyTorch's grouped product, each rounded once."""
    import torch

    from finetune.model.experts import expert_modules
    from finetune.model.routed_experts import routed_experts

    model = load(tiny, bases(kind), "quantization=nf4_double")
    plain = dense(model)
    for name, experts in expert_modules(model).items():
        x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(50)]).cuda()
        weights = torch.rand(50, 2, device="cuda", dtype=torch.bfloat16)
        slope = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16)
        results = []
        for output in (
            routed_experts(experts, x, index, weights),
            plain.get_submodule(name).float()(x.float(), index, weights.float()),
        ):
            (gradient,) = torch.autograd.grad(output, x, slope.to(output.dtype))
            results.append((output.float(), gradient.float()))
        for computed, expected in zip(*results, strict=True):
            assert (computed - expected).norm() < 0.02 * expected.norm()
