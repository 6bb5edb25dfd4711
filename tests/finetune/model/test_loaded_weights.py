"""Weights that are not in a base's files, or are not the model's, refuse the base or are logged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import matches
from support.bases import make_base, with_changed_json, with_changed_weights
from support.models import changed_copy
from support.runs import Tiny

from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

Weights = dict[str, Any]


def load(tiny: Tiny, folder: Path, *overrides: str) -> Any:
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none", f"model.name_or_path={folder}", *overrides)
    return load_base(find_base(config.model), config)


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        f"{prefix}{name}": tensor for name, tensor in weights.items()
    }


def without(text: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: each for name, each in weights.items() if text not in name
    }


def with_extra(*names: str) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        norm = weights["model.norm.weight"]
        return weights | {name: norm.clone() for name in names}

    return change


REFUSED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "torch.compile": (
        renamed("_orig_mod."),
        "lack 21 of the model's weights (lm_head.weight, model.embed_tokens.weight, …) and "
        "hold 20 that the model does not have (_orig_mod.model.embed_tokens.weight, …, …)",
    ),
    "DataParallel": (
        renamed("module."),
        "lack 21 of the model's weights (…) and hold 20 that …",
    ),
    "lightning": (
        renamed("net.backbone."),
        "lack 21 of the model's weights (…) and hold 20 …",
    ),
    "a layer's mlp": (
        without("layers.1.mlp"),
        "lack 3 of the model's weights (model.layers.1.mlp.down_proj.weight, …, …)",
    ),
    "one norm": (
        without("model.norm"),
        "lack 1 of the model's weights (model.norm.weight)",
    ),
    "the embedding": (without("embed_tokens"), "lack 2 of the model's weights (…)"),
    "a value head": (
        with_extra("v_head.summary.weight", "v_head.summary.bias"),
        "hold 2 that the model does not have (v_head.summary.bias, v_head.summary.weight)",
    ),
    "a merged adapter's leftovers": (
        with_extra("model.layers.0.self_attn.q_proj.lora_A.default.weight"),
        "hold 1 that the model does not have (model.layers.0…)",
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_weights_that_do_not_fit_refuse_the_base(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    change, says = REFUSED[kind]
    folder = with_changed_weights(tiny_base, tmp_path / "base", change)
    with pytest.raises(ConfigError) as refused:
        load(tiny, folder)
    expected = f"model.name_or_path={folder}: its files {says}"
    assert matches(expected, str(refused.value)), refused.value


def test_an_untied_base_without_its_head_is_refused(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    untied = changed_copy(tiny_base, tmp_path / "untied", tie_word_embeddings=False)
    folder = with_changed_weights(untied, tmp_path / "base", without("lm_head"))
    with pytest.raises(
        ConfigError, match=r"lack 1 of the model's weights \(lm_head\.weight\)$"
    ):
        load(tiny, folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_hidden_layers": 1},
            r"hold 9 that the model does not have \(model\.layers\.1",
        ),
        (
            {"num_hidden_layers": 3},
            r"lack 9 of the model's weights \(model\.layers\.2",
        ),
        (
            {"intermediate_size": 64},
            r"6 of its weights have another shape \(.*128.* in its files",
        ),
        ({"vocab_size": 700}, r"of its weights have another shape \(.*600x64.*700x64"),
    ],
)
def test_a_config_of_another_size_is_refused(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, changes: dict[str, int], says: str
) -> None:
    folder = with_changed_json(tiny_base, tmp_path / "base", **changes)
    with pytest.raises(ConfigError, match=says) as refused:
        load(tiny, folder)
    assert str(refused.value).startswith(f"model.name_or_path={folder}: ")
    assert "\n" not in str(refused.value)


LOGGED = {
    "vision": ["visual.blocks.0.norm.weight", "visual.merger.norm.weight"],
    "vision tower": [
        "model.vision_tower.norm.weight",
        "multi_modal_projector.norm.weight",
    ],
    "audio": ["audio_tower.norm.weight", "model.embed_audio.norm.weight"],
    "multi-token prediction": ["mtp.norm.weight", "mtp.layers.0.norm.weight"],
}


@pytest.mark.parametrize("kind", list(LOGGED))
def test_weights_of_other_modalities_are_logged(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    folder = with_changed_weights(
        tiny_base, tmp_path / "base", with_extra(*LOGGED[kind])
    )
    with caplog.at_level("INFO"):
        load(tiny, folder)
    names = ", ".join(sorted(LOGGED[kind]))
    assert (
        f"model: 2 of its weights not loaded, of other modalities or heads: {names}"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("transformer.h.0.attn.bias", "as the model's class ignores them"),
        ("transformer.h.0.attn.masked_bias", "as the model computes them"),
        ("transformer.h.0.attn.attention.masked_bias", "as the model computes them"),
        ("transformer.h.0.attn.rotary_emb.inv_freq", "as the model computes them"),
        ("transformer.position_ids", "as the model computes them"),
    ],
)
def test_masks_and_positions_of_older_files_are_logged(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    why: str,
) -> None:
    import torch

    gpt2 = make_base(tiny_base, tmp_path / "gpt2", "gpt2")
    extra = {name: torch.zeros(1)}
    folder = with_changed_weights(
        gpt2, tmp_path / "base", lambda weights: weights | extra
    )
    with caplog.at_level("INFO"):
        load(tiny, folder)
    assert f"model: 1 of its weights not loaded, {why}: {name}" in caplog.messages


@pytest.mark.parametrize("tied", [True, False])
def test_a_sound_base_is_loaded_without_a_line(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tied: bool,
) -> None:
    folder = changed_copy(tiny_base, tmp_path / "base", tie_word_embeddings=tied)
    with caplog.at_level("INFO"):
        load(tiny, folder)
    assert "of its weights" not in caplog.text
