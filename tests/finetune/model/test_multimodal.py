"""Models of text and images: the text model alone is loaded and trained, and its adapter has the
names of the published model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import tiny_overrides
from support.models import load, load_tokenizer, trainable, wake, with_tokenizer_of

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
DEBUG = ("trainer=debug", "quantization=none")


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": 1,
}
GEMMA4_TOWERS: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "audio_config": None,
}
WINDOWS = {"sliding_window": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**TEXT, **WINDOWS},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "ministral3"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 5,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {**TEXT, **LINEAR},
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": {
                **TEXT,
                **LINEAR,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "text_config": {
                **TEXT,
                **WINDOWS,
                "vocab_size_per_layer_input": 600,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 32,
            },
            **GEMMA4_TOWERS,
        },
    ),
    "gemma4_moe": (
        "Gemma4",
        {
            "text_config": {
                **TEXT,
                **WINDOWS,
                "vocab_size_per_layer_input": 600,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "global_head_dim": 32,
            },
            **GEMMA4_TOWERS,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **TEXT,
                "intermediate_size_mlp": 128,
                "num_local_experts": 2,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **VISION,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
}
"""Types of models with images as they are published: the class, and its small config."""

kinds = pytest.mark.parametrize("kind", list(PUBLISHED))


def whole_model(kind: str) -> Any:
    """The published model with random weights, towers and all."""
    import torch
    import transformers

    name, sections = PUBLISHED[kind]
    config = getattr(transformers, f"{name}Config")(**sections)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def published(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Saves a published model of a kind once, with the tiny base's tokenizer."""
    folders: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind) / "base"
            folders[kind] = with_tokenizer_of(tiny_base, whole_model(kind), folder)
        return folders[kind]

    return save


@pytest.fixture
def gemma3(published: Callable[[str], Path]) -> Path:
    """A Gemma 3 whose vision tower has layers with names that the language model's have too."""
    return published("gemma3")


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
        ("packed", "all-linear", ATTENTION | GATE),
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
    used = "trl" if engine == "trl" else "packed"
    assert (result["status"], result["engine"]) == ("completed", used)
    assert all(
        set(row) == {"prompt", "expected", "before", "after"}
        for row in json.loads((tmp_path / "samples.json").read_text())
    )
    layers = {
        f"model.language_model.layers.{layer}.{end}" for layer in (0, 1) for end in ends
    }
    assert adapted_layers(tmp_path) == layers
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(layers)
    said = (
        "model: of a model of type gemma3 its text model alone is loaded (gemma3_text), "
        "without: vision"
    )
    assert caplog.messages.count(said) == 1


@kinds
def test_an_adapter_has_the_same_logits_on_the_published_model_by_plain_peft(
    kind: str, published: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    base = published(kind)
    config = tiny(
        *DEBUG, f"model.name_or_path={base}", "lora.target_modules=all-linear"
    )
    names = names_on_the_published_model(config, base, tmp_path / "adapter")
    assert names
    assert all("language_model" in name for name in names)


CHOICES = {
    "rank by full name": ("rank_pattern={model.layers.0.self_attn.q_proj:3}",),
    "rank by short name": ("rank_pattern={q_proj:3}",),
    "alpha by full name": ("alpha_pattern={model.layers.0.self_attn.q_proj:640}",),
    "alpha by short name": ("alpha_pattern={q_proj:640}",),
    "some layers": ("layers_to_transform=[1]", "layers_pattern=model.layers"),
    "without a layer": (r"exclude_modules='model\.layers\.0\..*'",),
}
"""Items of `lora.extra` that choose layers by the names that the text model has."""


@pytest.mark.parametrize("choice", list(CHOICES))
def test_chosen_layers_are_the_same_on_the_published_model(
    choice: str, gemma3: Path, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(
        *DEBUG,
        f"model.name_or_path={gemma3}",
        "lora.target_modules=[q_proj,v_proj]",
        *(f"+lora.extra.{item}" for item in CHOICES[choice]),
    )
    names_on_the_published_model(config, gemma3, tmp_path / "adapter")


EXPERTS = "experts.gate_up_proj,experts.down_proj"


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma4_moe"])
@pytest.mark.parametrize(
    "extra",
    [
        (f"target_parameters=[{EXPERTS}]",),
        (
            f"target_parameters=[{EXPERTS}]",
            "alpha_pattern={gate_up_proj:64}",
            "rank_pattern={down_proj:3}",
        ),
        ("target_parameters=[model.layers.0.{experts}.down_proj]",),
    ],
    ids=["both weights", "rank and alpha", "one layer"],
)
# PEFT compares the patterns with modules alone, and uses those of weights all the same.
@pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys")
def test_an_adapter_on_experts_loads_on_the_published_model_and_on_the_text_model(
    extra: tuple[str, ...],
    kind: str,
    published: Callable[[str], Path],
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    from finetune.run.resources import SharedResources

    base = published(kind)
    experts = "experts" if kind == "gemma4_moe" else "mlp.experts"
    config = tiny(
        *DEBUG,
        f"model.name_or_path={base}",
        "lora.dropout=0",
        "lora.target_modules=[q_proj]",
        *(f"+lora.extra.{item}".replace("{experts}", experts) for item in extra),
    )
    SharedResources().check_targets(config)
    names = names_on_the_published_model(config, base, tmp_path / "adapter")
    assert any("experts" in name for name in names)


def names_on_the_published_model(
    config: RunConfig, base: Path, folder: Path
) -> list[str]:
    """Save an adapter and compare its logits where it is loaded: by plain PEFT, and here.

    Returns:
        The names of its layers in the published model.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from finetune.model.adapter import attach_adapter, save_adapter
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    trained = load(config)
    wake(trained)
    save_adapter(trained, load_tokenizer(config), folder)

    ids = torch.arange(20, 60)[None]
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        ours = trained.eval()(input_ids=ids).logits
        before = whole.eval()(input_ids=ids).logits
        model = PeftModel.from_pretrained(whole, folder)
        theirs = model.eval()(input_ids=ids).logits
        text_model = load_base(find_base(config.model), config)
        again = attach_adapter(text_model, folder).eval()
        assert torch.allclose(again(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs, before, atol=1e-2)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    return [name for name, _ in model.named_modules() if "lora_A" in name]


@kinds
def test_the_text_model_trains_packed_unless_its_own_code_computes_experts(
    kind: str, published: Callable[[str], Path], tiny: Tiny
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    config = tiny(*DEBUG, f"model.name_or_path={published(kind)}")
    expected = "trl" if kind == "llama4" else "packed"
    assert choose_engine(config, find_base(config.model)) == expected


@kinds
def test_the_text_models_weights_are_those_of_the_files(
    kind: str, published: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    """It has the logits of the whole model, and is saved as a model of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny(*DEBUG, f"model.name_or_path={published(kind)}")
    text = load_base(find_base(config.model), config).eval()
    ids = torch.arange(20, 60)[None]
    text.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = whole_model(kind)(input_ids=ids).logits
        for model in (text, again):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("exclusion", ["null", "[o_proj]", r"'.*\.o_proj'"])
def test_a_tower_that_is_loaded_gets_no_adapter(tiny: Tiny, exclusion: str) -> None:
    """Whatever else the config leaves out. Wrappers of other code are loaded as a whole."""
    from finetune.model.adapted_layers import adapted_layers
    from finetune.model.adapter import add_adapter

    lora = tiny("lora=r16", f"+lora.extra.exclude_modules={exclusion}").lora
    names = adapted_layers(add_adapter(whole_model("gemma3"), lora, seed=0))
    assert any("q_proj" in name for name in names)
    assert all("language_model" in name for name in names)
    assert any("o_proj" in name for name in names) is (exclusion == "null")


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


def test_a_merged_model_is_the_text_model(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.run.load import load_run
    from finetune.run.merging import merge

    rate = "optimizer.learning_rate=0.05"
    config = tiny(*DEBUG, f"model.name_or_path={gemma3}", rate, "sample_prompts=[]")
    run(config, tmp_path / "run")
    trained = load_run(tmp_path / "run")
    merged = merge(trained.base, trained.folder.adapter)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = load_run(tmp_path / "run").with_adapter()(input_ids=ids).logits
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-4)


def test_a_saved_adapter_is_loaded_again_into_the_text_model(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    import torch

    from finetune.model.adapter import load_adapter, save_adapter

    config = tiny(*DEBUG, f"model.name_or_path={gemma3}")
    model = load(config)
    wake(model)
    expected = {name: weight.clone() for name, weight in trainable(model).items()}
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.zero_()
    load_adapter(model, tmp_path / "adapter")
    for name, weight in trainable(model).items():
        assert torch.equal(weight, expected[name])


ALPHAS = "model.layers.0.self_attn.q_proj:64,v_proj:8"
PATTERNS = (
    f"+lora.extra.alpha_pattern={{{ALPHAS}}}",
    "+lora.extra.rank_pattern={model.layers.1.self_attn.q_proj:3}",
)


def test_training_goes_on_from_ranks_and_alphas_of_single_layers(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
    short = ("trainer.max_steps=2", "trainer.eval_steps=0", "sample_prompts=[]")
    base = (*DEBUG, *short, f"model.name_or_path={gemma3}", "lora/target=q_v")
    run(tiny(*base, *PATTERNS), tmp_path / "first")
    adapter = f"lora.adapter={tmp_path / 'first'}"
    run(tiny(*base, *PATTERNS, adapter), tmp_path / "second")

    first, second = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        for name in ("first", "second")
    )
    end = [row for row in map(json.loads, first) if "eval/loss" in row][-1]
    start = next(row for row in map(json.loads, second) if "eval/loss" in row)
    assert start["eval/loss"] == pytest.approx(end["eval/loss"], rel=1e-5)
    with pytest.raises(ConfigError) as refused:
        run(tiny(*base, PATTERNS[1], adapter), tmp_path / "third")
    assert str(refused.value) == (
        f"{adapter}: has alpha=64 for model.layers.0.self_attn.q_proj, the run 16: "
        "see lora.extra.alpha_pattern"
    )


@pytest.mark.parametrize(
    "expression",
    [
        ".*language_model.*layers.0.*q_proj",
        "language_model.layers.0.self_attn.q_proj",
        r"model\.language_model\.layers\.0\.self_attn\.q_proj",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_a_pattern_of_the_published_model_is_an_expression(
    tiny: Tiny, gemma3: Path, tmp_path: Path, expression: str
) -> None:
    """As of an adapter that plain PEFT has trained on the whole model, or an earlier version."""
    from finetune.model.adapted_layers import adapted_layers
    from finetune.model.adapter import attach_adapter, save_adapter
    from finetune.model.initial_adapter import check_initial_adapter
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny(*DEBUG, f"model.name_or_path={gemma3}", *PATTERNS[:1])
    model = load(config)
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    saved = json.loads(file.read_text())
    others = {
        name: alpha
        for name, alpha in saved["alpha_pattern"].items()
        if not name.endswith("layers.0.self_attn.q_proj")
    }
    assert len(others) == len(saved["alpha_pattern"]) - 1
    saved["alpha_pattern"] = {expression: 64, **others}
    file.write_text(json.dumps(saved))

    source = find_base(config.model)
    attached = attach_adapter(load_base(source, config), tmp_path / "adapter")
    assert adapted_layers(attached) == adapted_layers(model)
    goes_on = (
        *DEBUG,
        f"model.name_or_path={gemma3}",
        f"lora.adapter={tmp_path / 'adapter'}",
    )
    same = tiny(*goes_on, *PATTERNS[:1])
    check_initial_adapter(source, same.model, same.lora)
    plain = tiny(*goes_on)
    with pytest.raises(ConfigError, match="has alpha=64 for model"):
        check_initial_adapter(source, plain.model, plain.lora)


def test_it_is_planned(
    station: Station, tiny_base: Path, gemma3: Path, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tiny_base), *DEBUG, f"model.name_or_path={gemma3}"]
    done = station.run(*overrides, module="finetune.plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peak of one run" in done.stdout


def test_a_plan_is_that_of_the_text_model(
    tiny: Tiny, gemma3: Path, tmp_path: Path
) -> None:
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
    assert wrapped.peak() == plain.peak()
    assert wrapped.weights == plain.weights


@pytest.mark.parametrize(
    ("kind", "has_kernels"),
    [
        *((kind, False) for kind in ("GPT2", "Mamba", "OPT", "Qwen3Moe", "GptOss")),
        # Of their text models.
        *((kind, True) for kind in ("Gemma3", "Mistral3", "Llava")),
    ],
)
def test_whether_an_architecture_has_kernels_is_told_from_its_text_model(
    kind: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch, tiny: Tiny
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
    supported = supports_gpu_decoder(shapes, tiny().quantization)
    assert supported is has_kernels


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
