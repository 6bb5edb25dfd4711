"""Adapters that are put on a base: all of their weights have a place, and none is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError
from finetune.model.adapter import attach_adapter
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def load(base: Path) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    return model


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A saved adapter of the tiny base."""
    return save(tiny_base, tmp_path / "adapter")


def save(base: Path, folder: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings
    )
    get_peft_model(load(base), config).save_pretrained(folder)
    return folder


def with_config(folder: Path, **changes: Any) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def without_a_layer(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if "layers.1" not in name}


def with_a_ninth_layer(weights: Weights) -> Weights:
    copies = {
        name.replace("layers.1", "layers.9"): weights[name] + 0 for name in weights
    }
    return weights | copies


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights are missing": (
        lambda folder: with_weights(folder, without_a_layer),
        r"is no complete adapter of its base: lacks 4 weights, as base_model\.",
    ),
    "weights of other layers": (
        lambda folder: with_weights(folder, with_a_ninth_layer),
        r"has no layer for 4 weights, as .*layers\.9",
    ),
    "DoRA without its magnitudes": (
        lambda folder: with_config(folder, use_dora=True),
        "lacks 4 weights, as .*lora_magnitude_vector",
    ),
    "another rank": (
        lambda folder: with_config(folder, r=8),
        "can't be loaded as an adapter: .*size mismatch",
    ),
    "a modules_to_save that was not saved": (
        lambda folder: with_config(folder, modules_to_save=["lm_head"]),
        "can't be loaded as an adapter|is no complete adapter",
    ),
    "cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"abc"),
        "can't be loaded as an adapter: Error while deserializing header",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_an_adapter_that_is_not_complete_is_refused(
    damage: str, adapter: Path, tiny_base: Path
) -> None:
    change, line = DAMAGES[damage]
    change(adapter)
    with pytest.raises(ConfigError, match=f"^{adapter}: .*({line})"):
        attach_adapter(load(tiny_base), adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=["plain", "DoRA", "ranks of layers", "tokens"],
)
def test_a_complete_adapter_is_attached(
    settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folder = save(tiny_base, tmp_path / "adapter", **settings)
    attach_adapter(load(tiny_base), folder)


def test_embeddings_that_were_saved_with_it_are_no_mistake(
    adapter: Path, tiny_base: Path
) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    embeddings = load(tiny_base).get_input_embeddings().weight.detach() + 1
    with_weights(adapter, lambda weights: weights | {name: embeddings})
    model = attach_adapter(load(tiny_base), adapter)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
