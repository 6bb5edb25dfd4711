"""An adapter that a run goes on from (`lora.adapter`): that of a run, or a folder of PEFT's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from finetune.config.sections.lora import LoraSettings
from finetune.config.sections.model import ModelSettings
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.adapted_layers import AdaptedLayer, adapted_layers
from finetune.model.adapter import add_weightless_adapter, load_adapter
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS
from finetune.model.base_config import read_base_config, read_published_config
from finetune.model.loading import skeleton_of
from finetune.model.lora_config import lora_config
from finetune.model.published_names import PublishedNames, published_names
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from peft import PeftModel

COMPARED = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "bias": "lora.bias",
}
"""Arguments of `LoraConfig` that an adapter shares with the run, and their keys."""


def load_initial_adapter(model: "PeftModel", lora: LoraSettings) -> None:
    """Give a fresh adapter the weights of `lora.adapter`, if there is one.

    Args:
        model: The adapter on its base; its weights are not on the meta device.
        lora: The adapter's settings, checked by `check_initial_adapter`.
    """
    if lora.adapter is not None:
        load_adapter(model, _adapter_folder(lora.adapter))


def check_initial_adapter(
    source: BaseSource, model: ModelSettings, lora: LoraSettings
) -> None:
    """Check `lora.adapter` against the run and its base, before the base's weights are loaded.

    Raises:
        ConfigError: The folder has no adapter, or one of another base, rank, scaling or other
            layers.
    """
    if lora.adapter is None:
        return
    folder = _adapter_folder(lora.adapter)
    saved = read_json(folder / ADAPTER_CONFIG)
    if saved is None or not (folder / WEIGHTS).is_file():
        reason = (
            f"has no adapter ({ADAPTER_CONFIG}, {WEIGHTS}); "
            "allowed: a run folder, or a folder of PEFT's"
        )
        raise refusal("lora.adapter", lora.adapter, reason)
    _require_same_base(source, lora.adapter)
    _require_same_arguments(saved, lora)
    _require_same_layers(folder, saved, source, model, lora)


def _adapter_folder(path: str) -> Path:
    """Return the folder of PEFT's: the one that is given, or that of a run."""
    folder = Path(path).expanduser()
    adapter = RunFolder(folder).adapter
    return adapter if (adapter / ADAPTER_CONFIG).is_file() else folder


def _require_same_base(source: BaseSource, path: str) -> None:
    """Compare the base with that of a run; a folder of PEFT's does not say enough of it."""
    run = read_json(RunFolder(Path(path).expanduser()).identity)
    if run is None or run["base_model"] is None:
        return
    there, here = run["base_model"], source.identity
    # The same weights may lie in another folder.
    key = "sha256" if there["sha256"] and here["sha256"] else "name"
    if there[key] == here[key]:
        return
    name = run["config"]["model"]["name_or_path"]
    reason = f"was trained on another base: model.name_or_path={name}"
    raise refusal("lora.adapter", path, reason)


def _require_same_arguments(saved: dict[str, Any], lora: LoraSettings) -> None:
    if saved.get("peft_type") != "LORA":
        reason = f"is no LoRA adapter (peft_type {saved.get('peft_type')})"
        raise refusal("lora.adapter", str(lora.adapter), reason)
    initialization = saved.get("init_lora_weights", True)
    if initialization not in (True, False, "gaussian"):
        reason = (
            f"belongs to a base that init_lora_weights={initialization} has changed"
        )
        raise refusal("lora.adapter", str(lora.adapter), reason)
    config = lora_config(lora).to_dict()
    for argument, key in COMPARED.items():
        # An argument that PEFT did not have yet is one that is off.
        value = saved.get(argument) or None
        if value != (config[argument] or None):
            there, here = _as_text(saved.get(argument)), _as_text(config[argument])
            reason = f"has {key}={there}, the run {here}"
            raise refusal("lora.adapter", str(lora.adapter), reason)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_same_layers(
    folder: Path,
    saved: dict[str, Any],
    source: BaseSource,
    model: ModelSettings,
    lora: LoraSettings,
) -> None:
    """Compare names, ranks, alphas and shapes of the matrices with those of a fresh adapter."""
    from peft import get_peft_model_state_dict

    skeleton = skeleton_of(read_base_config(source, model), model)
    names = published_names(read_published_config(source, model), skeleton)
    adapted = add_weightless_adapter(skeleton, lora)
    with torch.device("meta"):
        fresh = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS, "pt") as file:
        shapes = {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118  it is no mapping
        }
    if names is not None:
        shapes = names.of_text_model(shapes)
    if shapes.keys() != fresh.keys():
        there, here = _layer_names(shapes), _layer_names(fresh)
        reason = f"adapts {there}, the run {here}: see lora.target_modules"
        raise refusal("lora.adapter", str(lora.adapter), reason)
    _require_same_patterns(saved, adapted_layers(adapted), names, lora)
    for name, weight in fresh.items():
        if shapes[name] != tuple(weight.shape):
            reason = (
                f"was trained on another base: {name} has the shape {list(shapes[name])}, "
                f"here {list(weight.shape)}"
            )
            raise refusal("lora.adapter", str(lora.adapter), reason)


def _require_same_patterns(
    saved: dict[str, Any],
    layers: Mapping[str, AdaptedLayer],
    names: PublishedNames | None,
    lora: LoraSettings,
) -> None:
    """Compare ranks and alphas layer by layer: the same may be written by other patterns."""
    from peft.utils.other import get_pattern_key

    for pattern_name, default, field in (
        ("rank_pattern", "r", "r"),
        ("alpha_pattern", "lora_alpha", "alpha"),
    ):
        pattern = saved.get(pattern_name) or {}
        if names is not None:
            pattern = names.pattern_of_text_model(pattern, layers)
        for name, layer in layers.items():
            there = pattern.get(get_pattern_key(pattern, name), saved[default])
            here = getattr(layer, field)
            if there != here:
                reason = (
                    f"has {field}={there} for {name}, the run {here}: "
                    f"see lora.extra.{pattern_name}"
                )
                raise refusal("lora.adapter", str(lora.adapter), reason)


def _layer_names(weights: dict[str, Any]) -> str:
    """Return which layers have weights, and how many, for a message."""
    layers = {name.partition(".lora_")[0] for name in weights}
    ends = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    return f"{len(layers)} layers ({', '.join(ends)})"
