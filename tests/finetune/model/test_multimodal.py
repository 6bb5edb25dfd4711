"""A model of text and images: its sizes stand in an inner config, and only its language model gets
an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import tiny_overrides
from support.models import with_tokenizer_of

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
DEBUG = ("trainer=debug", "quantization=none")


@pytest.fixture(scope="module")
def gemma3(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of random weights with its vision tower, whose layers have names that the language
    model's have too."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        **heads,
    }
    image = {"image_size": 28, "patch_size": 14}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **image,
    }
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**text, "sliding_window": 16, "max_position_embeddings": 512},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    folder = tmp_path_factory.mktemp("gemma3") / "base"
    return with_tokenizer_of(tiny_base, Gemma3ForConditionalGeneration(config), folder)


def adapted_layers(folder: Path) -> set[str]:
    """The layers of a run's adapter, by their names in the base."""
    from safetensors.torch import load_file

    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names
    }


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
GATE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("engine", "target", "ends"),
    [
        ("auto", "all-linear", ATTENTION | GATE),
        ("trl", "all-linear", ATTENTION | GATE),
        ("auto", "[q_proj,v_proj]", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("auto", "[down_proj]", {"mlp.down_proj"}),
        ("auto", r"'.*\.(q|k)_proj'", {"self_attn.q_proj", "self_attn.k_proj"}),
    ],
)
def test_a_run_trains_its_language_model_alone(
    tiny: Tiny,
    gemma3: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    engine: str,
    target: str,
    ends: set[str],
) -> None:
    config = tiny(
        *DEBUG,
        f"model.name_or_path={gemma3}",
        f"trainer.engine={engine}",
        f"lora.target_modules={target}",
    )
    with caplog.at_level("INFO"):
        run(config, tmp_path)

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["engine"]) == ("completed", "trl")
    assert all(
        set(row) == {"prompt", "expected", "before", "after"}
        for row in json.loads((tmp_path / "samples.json").read_text())
    )
    assert adapted_layers(tmp_path) == {
        f"model.language_model.layers.{layer}.{end}" for layer in (0, 1) for end in ends
    }
    said = f"engine: trl, as packed does not do model.name_or_path={gemma3} (of type gemma3)"
    assert (said in caplog.messages) == (engine == "auto")
    assert any(
        line.startswith("lora: the language model gets the adapter; without: model.")
        for line in caplog.messages
    )


def test_packed_is_refused_by_the_models_type(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    config = tiny(*DEBUG, f"model.name_or_path={gemma3}", "trainer.engine=packed")
    with pytest.raises(
        ConfigError,
        match=r"^trainer\.engine=packed: does not do .*\(of type gemma3\); allowed: auto, trl$",
    ):
        run(config, tmp_path)


def test_the_tower_is_trained_where_it_is_asked_for(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    config = tiny(
        *DEBUG,
        f"model.name_or_path={gemma3}",
        "sample_prompts=[]",
        "+lora.extra.exclude_modules=null",
    )
    run(config, tmp_path)
    assert any("vision_tower" in name for name in adapted_layers(tmp_path))


@pytest.mark.parametrize("target", ["out_proj", "fc1"])
def test_a_target_that_only_the_tower_has_is_refused(
    tiny: Tiny, gemma3: Path, tmp_path: Path, target: str
) -> None:
    config = tiny(
        *DEBUG, f"model.name_or_path={gemma3}", f"lora.target_modules=[{target}]"
    )
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path)
    there = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert (
        str(caught.value)
        == f"lora.target_modules={target}: matches no linear layer; allowed: {there}"
    )


def test_the_adapter_loads_where_it_is_used(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    from finetune.engine.generation import generate_answers
    from finetune.run.load import load_run

    run(tiny(*DEBUG, f"model.name_or_path={gemma3}", "sample_prompts=[Hm?]"), tmp_path)

    trained = load_run(tmp_path)
    bounds: dict[str, Any] = {
        "max_new_tokens": trained.config.sample_max_new_tokens,
        "max_length": 64,
    }
    texts = generate_answers(
        trained.with_adapter(),
        trained.tokenizer,
        ["Hm?"],
        trained.config.quantization,
        **bounds,
    )
    assert texts == [
        row["after"] for row in json.loads((tmp_path / "samples.json").read_text())
    ]


def test_it_is_planned(
    station: Station, tiny_base: Path, gemma3: Path, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tiny_base), *DEBUG, f"model.name_or_path={gemma3}"]
    done = station.run(*overrides, module="finetune.plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peak of one run" in done.stdout


def test_a_plan_reads_the_sizes_of_the_language_model(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    """Of the vision tower there is memory for the weights alone."""
    from transformers import AutoConfig, AutoTokenizer, Gemma3ForCausalLM

    from finetune.run.memory_plan import plan_memory
    from finetune.run.resources import SharedResources

    alone = tmp_path / "language"
    text_config = AutoConfig.from_pretrained(gemma3).text_config
    Gemma3ForCausalLM(text_config).save_pretrained(alone)
    AutoTokenizer.from_pretrained(gemma3).save_pretrained(alone)
    resources = SharedResources()
    wrapped, plain = (
        plan_memory(tiny(*DEBUG, f"model.name_or_path={base}"), resources)
        for base in (gemma3, alone)
    )
    assert wrapped.activations == plain.activations
    assert wrapped.logits == plain.logits
    assert wrapped.base > plain.base
    assert wrapped.weights == pytest.approx(plain.weights, rel=0.01)


@pytest.mark.parametrize(
    "kind",
    ["Gemma3", "GPT2", "Mamba", "OPT", "Qwen3Moe", "GptOss", "Mistral3", "Llava"],
)
def test_no_size_of_another_architecture_is_asked_for_to_tell_that_it_has_no_kernels(
    kind: str, monkeypatch: pytest.MonkeyPatch, tiny: Tiny
) -> None:
    import torch
    import transformers

    from finetune.engine.packed.backend import supports_gpu_decoder

    monkeypatch.setattr(
        "finetune.engine.packed.backend.is_ampere_or_later", lambda _: True
    )
    monkeypatch.setattr(
        "finetune.engine.packed.backend.compute_dtype", lambda _: torch.bfloat16
    )
    monkeypatch.setattr("finetune.engine.packed.backend._kernels_work", lambda: True)
    shapes = getattr(transformers, f"{kind}Config")()
    assert supports_gpu_decoder(transformers.LlamaConfig(), tiny().quantization)
    assert not supports_gpu_decoder(shapes, tiny().quantization)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    ("kind", "shapes", "refused"),
    [
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, None),
        (
            "OPT",
            {
                "hidden_size": 64,
                "ffn_dim": 128,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 64,
            },
            None,
        ),
        (
            "Mamba",
            {"hidden_size": 64, "state_size": 8},
            "no plan for a model without attention heads",
        ),
    ],
)
def test_a_plan_of_another_architecture_is_made_or_refused_in_one_line(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    kind: str,
    shapes: dict[str, int],
    refused: str | None,
) -> None:
    import transformers

    from finetune.run.memory_plan import plan_memory
    from finetune.run.resources import SharedResources

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=600, num_hidden_layers=2, **shapes
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    base = with_tokenizer_of(tiny_base, model, tmp_path / "base")
    asked = tiny(*DEBUG, f"model.name_or_path={base}")
    if refused is None:
        assert plan_memory(asked, SharedResources()).peak() > 0
    else:
        with pytest.raises(
            ConfigError, match=f"^model\\.name_or_path={base}: {refused}$"
        ):
            plan_memory(asked, SharedResources())
