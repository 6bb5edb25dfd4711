"""Where the blocks of a base are, over how many GPUs, and what is refused there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finetune.compat import remove_device_hooks
from finetune.config.schema import RunConfig
from finetune.engine.selection import choose_engine
from finetune.errors import ConfigError
from finetune.model import device
from finetune.model.device import spread_gpus
from finetune.model.layer_devices import (
    Placement,
    WeightBytes,
    reason_not_spread,
    spread_blocks,
)
from finetune.model.loading import load_base
from finetune.model.source import find_base
from finetune.run.load import load_run
from finetune.run.memory_plan import plan_memory
from finetune.run.resources import SharedResources
from finetune.run.spreading import spread_over

Tiny = Callable[..., RunConfig]


def skeleton(layers: int = 8, tied: bool = False, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=more.pop("vocabulary", 100),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        **more,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocabulary", [10, 1000, 100_000])
@pytest.mark.parametrize(("layers", "gpus"), [(8, 2), (9, 2), (7, 3), (80, 4), (3, 3)])
def test_consecutive_blocks_are_spread_evenly(
    layers: int, gpus: int, vocabulary: int, tied: bool
) -> None:
    base = skeleton(layers, tied, vocabulary=vocabulary)
    size = WeightBytes(0.5, 2)
    placement = spread_blocks(base, gpus, size)
    blocks = placement.blocks
    assert list(blocks) == sorted(blocks)
    assert set(blocks) == set(range(gpus))
    assert placement.head == (0 if tied else gpus - 1)
    numbers = [number for gpu in range(gpus) for number in placement.blocks_on(gpu)]
    assert numbers == list(range(layers))
    # Every weight has a GPU, and that of its block.
    places = placement.device_map(base)
    for name, _ in [*base.named_parameters(), *base.named_buffers()]:
        (gpu,) = {
            gpu for module, gpu in places.items() if name.startswith(f"{module}.")
        }
        if ".layers." in name:
            assert gpu == blocks[int(name.split(".")[2])]
    # The fullest has no more than an even share and a block, or what can't be divided.
    block = sum(w.numel() for w in base.model.layers[0].parameters()) * 0.5
    embedding = vocabulary * 16 * 2
    total = block * layers + embedding * (1 if tied else 2)
    largest = max(placement.shares(base, size)) * total
    assert largest <= max(total / gpus, embedding + block) + 1.5 * block


def test_a_large_embedding_takes_the_place_of_blocks() -> None:
    base = skeleton(80, vocabulary=10_000)
    blocks = spread_blocks(base, 4, WeightBytes(0.5, 2)).blocks
    counts = [blocks.count(gpu) for gpu in range(4)]
    assert counts[0] == counts[3] < counts[1] == counts[2]


@pytest.mark.parametrize(
    ("base", "gpus", "reason"),
    [
        (lambda: skeleton(), 2, None),
        (lambda: skeleton(tied=True), 2, None),
        (lambda: skeleton(2), 3, "the base has 2 blocks"),
        (lambda: gpt2(), 2, "a base of type gpt2 has other modules"),
        (lambda: shared(), 2, "the blocks of a base of type llama share weights"),
        (lambda: gemma4(), 2, "the blocks of a base of type gemma4_text share tensors"),
    ],
    ids=["untied", "tied", "few", "gpt2", "shared", "gemma4"],
)
def test_what_can_be_spread(base: Any, gpus: int, reason: str | None) -> None:
    found = reason_not_spread(base(), gpus)
    assert found is None if reason is None else str(found).startswith(reason)


def gpt2() -> Any:
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=100)
        )


def shared() -> Any:
    base = skeleton()
    layers = base.model.layers
    layers[5].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    return base


def gemma4() -> Any:
    from support.decoder_bases import ARCHITECTURES

    config = transformers.Gemma4TextConfig(
        **{**ARCHITECTURES["gemma4_text"], "hidden_size": 32, "vocab_size": 100}
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("visible", "setting", "gpus"),
    [(0, "auto", 1), (4, "auto", 1), (4, 2, 2), (2, 2, 2), (0, 1, 1)],
)
def test_so_many_gpus(
    visible: int, setting: int | str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, visible)
    assert spread_gpus(setting) == gpus


@pytest.mark.parametrize(
    ("visible", "setting", "line"),
    [
        (0, 2, "trainer.gpus=2: 0 GPUs are visible here"),
        (1, 2, "trainer.gpus=2: 1 GPU is visible here"),
        (4, 8, "trainer.gpus=8: 4 GPUs are visible here"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    visible: int, setting: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, visible)
    with pytest.raises(ConfigError, match=re.escape(line)):
        spread_gpus(setting)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["lora.use_dora=true"], "lora.use_dora=true needs one GPU; allowed: 1"),
        (["lora.bias=lora_only"], "lora.bias=lora_only needs one GPU; allowed: 1"),
        (["trainer.engine=trl"], "the trl engine computes on one GPU; allowed: 1"),
        (
            ["lora.bias=all"],
            "the trl engine computes on one GPU, and packed does not do",
        ),
        (
            ["+model.extra.device_map=auto"],
            "model.extra.device_map says where the base is",
        ),
        (["trainer.gpus=4"], "the base has 2 blocks; allowed: 1"),
    ],
)
def test_what_needs_one_gpu_is_refused_in_one_line(
    tiny: Tiny, overrides: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("trainer.gpus=2", *overrides)
    see_gpus(monkeypatch, 4)
    with pytest.raises(ConfigError) as error:
        choose_engine(config, find_base(config.model))
    gpus = config.trainer.gpus
    assert str(error.value).startswith(f"trainer.gpus={gpus}: {reason}")
    assert "\n" not in str(error.value)


def test_two_gpus_are_the_packed_engines(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("trainer.gpus=2")
    see_gpus(monkeypatch, 2)
    assert choose_engine(config, find_base(config.model)) == "packed"


@pytest.mark.parametrize(
    ("visible", "setting", "of_worker", "gpus"),
    [
        (4, "auto", 2, 2),
        (4, "auto", 1, "auto"),
        (0, "auto", 2, "auto"),
        (4, 3, 2, 3),
    ],
)
def test_a_study_decides_the_gpus_of_its_trials(
    tiny: Tiny,
    visible: int,
    setting: int | str,
    of_worker: int,
    gpus: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see_gpus(monkeypatch, visible)
    config = tiny(f"trainer.gpus={setting}")
    assert spread_over(config, of_worker).trainer.gpus == gpus


def test_the_plan_is_of_the_fullest_gpu(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("trainer.gradient_checkpointing=true")
    plan = plan_memory(config, SharedResources())
    monkeypatch.setattr("finetune.run.stages.spread_gpus", lambda setting: 2)
    monkeypatch.setattr(
        "finetune.run.memory_plan.available_memory", lambda gpus=1: gpus
    )
    spread = plan_memory(config, SharedResources())
    # Two blocks and an embedding that is the head: one GPU has the embedding and a block.
    assert plan.fullest.base / 2 < spread.fullest.base < plan.fullest.base
    assert (plan.gpus, spread.gpus) == (1, 2)
    assert spread.available == 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_transformers_loads_by_the_map(
    tiny: Tiny, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two GPUs, but that both are the CPU."""
    maps = []

    def device_map(placement: Placement, base: Any) -> dict[str, str]:
        maps.append(original(placement, base))
        return dict.fromkeys(maps[0], "cpu")

    original = Placement.device_map
    monkeypatch.setattr(Placement, "device_map", device_map)
    monkeypatch.setattr("finetune.model.loading.spread_gpus", lambda setting: 2)
    config = tiny(f"quantization={quantization}")
    base = load_base(find_base(config.model), config)
    logits = base(torch.tensor([[1, 2, 3]])).logits
    monkeypatch.undo()
    expected = load_base(find_base(config.model), config)
    assert torch.equal(logits, expected(torch.tensor([[1, 2, 3]])).logits)
    assert maps == [
        {
            "model.embed_tokens": 0,
            "model.layers.0": 0,
            "model.layers.1": 1,
            "model.norm": 1,
            "model.rotary_emb": 0,
            "lm_head": 0,
        }
    ]


def test_accelerates_hooks_are_removed(tiny: Tiny) -> None:
    from accelerate import dispatch_model

    config = tiny("quantization=none")
    base = load_base(find_base(config.model), config)
    expected = base(torch.tensor([[1, 2, 3]])).logits
    dispatch_model(base, {"": "cpu"}, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in base.modules())
    remove_device_hooks(base)
    assert not any(hasattr(module, "_hf_hook") for module in base.modules())
    assert not hasattr(base, "hf_device_map")
    assert torch.equal(base(torch.tensor([[1, 2, 3]])).logits, expected)


def test_a_run_of_more_gpus_is_loaded_on_those_that_there_are(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.run.context import RunContext
    from finetune.run.run import run

    config = tiny("trainer.max_steps=1", "sample_prompts=[]")
    run(config, tmp_path, RunContext(interactive=False))
    identity = tmp_path / "run.json"
    text = identity.read_text()
    assert '"gpus": "auto"' in text
    identity.write_text(text.replace('"gpus": "auto"', '"gpus": 2'))
    assert load_run(tmp_path).config.trainer.gpus == 2

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("finetune.model.loading.load_base", no_room)
    line = "trainer.gpus=2: the run's base does not fit here, on 1 GPU"
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_run(tmp_path)


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a process count so many GPUs."""
    monkeypatch.setattr(device, "on_gpu", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
