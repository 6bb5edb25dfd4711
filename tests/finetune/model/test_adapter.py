"""The LoRA adapter: precision, seeds, target modules, saving and loading."""

import shutil
from pathlib import Path

import pytest
from support.models import changed_copy, load, load_tokenizer, trainable, wake
from support.runs import Tiny

from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.mark.parametrize(
    "overrides",
    [["quantization=none"], ["quantization=nf4"], ["quantization=int8"], ["quantization=none", "model.dtype=bfloat16"],
     ["quantization=nf4", "quantization.bnb_4bit_compute_dtype=bfloat16"]],
    ids=["none", "nf4", "int8", "bfloat16_base", "nf4_in_bfloat16"],
)  # fmt: skip
def test_adapter_weights_are_float32(tiny: Tiny, overrides: list[str]) -> None:
    import torch

    weights = trainable(load(tiny(*overrides)))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 7 * 2


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another(
    tiny: Tiny,
) -> None:
    import torch

    first = trainable(load(tiny("seed=5")))
    torch.rand(3)  # whatever else has drawn random numbers
    same, other = trainable(load(tiny("seed=5"))), trainable(load(tiny("seed=6")))
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    drawn = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_fresh_adapter_answers_as_its_base(tiny: Tiny) -> None:
    import torch

    model = load(tiny("quantization=none")).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_out_the_output_head(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, quantization: str, tied: bool
) -> None:
    folder = tiny_base
    if not tied:
        folder = changed_copy(tiny_base, tmp_path / "untied", tie_word_embeddings=False)
    model = load(tiny(f"quantization={quantization}", f"model.name_or_path={folder}"))
    adapted = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    projections = {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert adapted == projections


def test_target_modules_that_the_base_lacks_are_refused_with_those_it_has(
    tiny: Tiny,
) -> None:
    from finetune.model.source import find_base
    from finetune.model.target_modules import check_targets

    def check(*overrides: str) -> None:
        config = tiny(*overrides)
        check_targets(find_base(config.model), config.model, config.lora)

    check()
    check("lora.target_modules=[q_proj,down_proj]")
    check("lora.target_modules=[layers.0.self_attn.q_proj]")
    for missing in ("c_attn", "proj", "embed_tokens", "self_attn"):
        with pytest.raises(
            ConfigError, match=rf"lora\.target_modules={missing}: .*down_proj.*v_proj"
        ) as refused:
            check(f"lora.target_modules=[q_proj,{missing}]")
        assert "\n" not in str(refused.value)


def test_the_check_of_target_modules_reads_no_weights(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.model.source import BaseSource
    from finetune.model.target_modules import check_targets

    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    config = tiny("lora.target_modules=[c_attn]")
    with pytest.raises(ConfigError, match=r"lora\.target_modules=c_attn"):
        check_targets(BaseSource(str(tmp_path), "bare"), config.model, config.lora)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "extra",
    [[], ["lora.use_rslora=true", "lora.r=3", "lora.alpha=5"], ["lora.use_dora=true"]],
)
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, quantization: str, extra: list[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.model.adapter import save_adapter
    from finetune.model.quantization import quantization_config

    config = tiny(f"quantization={quantization}", *extra)
    model = load(config)
    wake(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "left_by_an_older_save").touch()
    save_adapter(model, load_tokenizer(config), folder)

    base = AutoModelForCausalLM.from_pretrained(
        tiny_base,
        dtype=torch.float32,
        quantization_config=quantization_config(config.quantization),
    )
    for module in (
        base.modules()
    ):  # bitsandbytes' inference in bfloat16 on some CPUs would blur the comparison
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).logits
        theirs = plain(input_ids=ids).logits
        with plain.disable_adapter():
            untouched = plain(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (theirs - untouched).abs().max() > 0.1
    assert not (folder / "left_by_an_older_save").exists()
    assert sorted(
        path.name for path in tmp_path.iterdir() if "adapter" in path.name
    ) == ["adapter"]
    assert {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl"} == set()


def test_load_adapter_restores_the_saved_weights_exactly(
    tiny: Tiny, tmp_path: Path
) -> None:
    import torch

    from finetune.model.adapter import load_adapter, save_adapter

    config = tiny()
    model = load(config)
    wake(model)
    saved = {name: weight.detach().clone() for name, weight in trainable(model).items()}
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    for weight in trainable(model).values():
        weight.data.add_(1.0)
    load_adapter(model, tmp_path / "adapter")
    assert all(
        torch.equal(weight, saved[name]) for name, weight in trainable(model).items()
    )


def test_a_saved_adapter_has_pefts_and_the_tokenizers_own_files(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Each of them, however often adapters of the same base are saved."""
    from transformers import AutoTokenizer

    from finetune.model.adapter import save_adapter
    from finetune.model.origin import public_base_name

    config = tiny("quantization=none")
    model, tokenizer = load(config), load_tokenizer(config)
    for name in ("first", "second"):
        wake(model)
        save_adapter(model, tokenizer, tmp_path / name)
        with public_base_name(model):
            model.save_pretrained(tmp_path / "expected", save_embedding_layers=False)
        unchanged = AutoTokenizer.from_pretrained(config.model.name_or_path)
        unchanged.save_pretrained(tmp_path / "expected")
        expected = {path.name for path in (tmp_path / "expected").iterdir()}
        saved = {path.name for path in (tmp_path / name).iterdir()}
        assert saved == expected | {"generation_config.json"}
        for file in expected:
            content = (tmp_path / "expected" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == content, file
        shutil.rmtree(tmp_path / "expected")
