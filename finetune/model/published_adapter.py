"""Adapter files with the layer names of the published model."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.files.atomic import read_json, write_json
from finetune.model.adapted_layers import adapted_layers
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS
from finetune.model.published_names import ADAPTED, PublishedNames

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CHOOSES_LAYERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Arguments of `LoraConfig` beside the targets."""


def rename_for_published(
    folder: Path, model: "PeftModel", names: PublishedNames
) -> None:
    """Give a saved adapter the names that its layers have in the published model.

    Each layer is named in full, with its rank and alpha if they differ from the adapter's: the
    other modalities have layers of the same names, and patterns for the text model's names would
    match others or none.
    """
    weights = names.of_published(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = read_json(folder / ADAPTER_CONFIG)
    modules: list[str] = []
    parameters: list[str] = []
    ranks, alphas = {}, {}
    for text_name, layer in sorted(adapted_layers(model).items()):
        name = names.to_published(text_name)
        (parameters if layer.is_parameter else modules).append(name)
        if layer.r != config["r"]:
            ranks[name] = layer.r
        if layer.alpha != config["lora_alpha"]:
            alphas[name] = layer.alpha
    config |= {
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **dict.fromkeys(CHOOSES_LAYERS),
    }
    write_json(folder / ADAPTER_CONFIG, config)


def rename_for_text_model(
    config: "LoraConfig", names: PublishedNames, folder: Path
) -> None:
    """Turn the layers' names in the settings of a saved adapter into those of the text model.

    Args:
        config: The settings.
        names: The names.
        folder: The adapter's folder.
    """
    rename = names.from_published
    if not isinstance(config.target_modules, str):
        config.target_modules = {rename(name) for name in config.target_modules or ()}
    if config.target_parameters:
        config.target_parameters = [rename(name) for name in config.target_parameters]
    layers = _adapted_names(folder, config, names)
    config.rank_pattern = names.pattern_of_text_model(config.rank_pattern, layers)
    config.alpha_pattern = names.pattern_of_text_model(config.alpha_pattern, layers)


def _adapted_names(
    folder: Path, config: "LoraConfig", names: PublishedNames
) -> set[str]:
    """Return the names of the layers and weights in the text model that have weights in a file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        weights = dict.fromkeys(file.keys())
    layers = {
        name.removeprefix(ADAPTED).partition(".lora_")[0]
        for name in names.of_text_model(weights)
    }
    # Weights of experts are named in full in the settings.
    return layers | set(config.target_parameters or ())
