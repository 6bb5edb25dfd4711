"""What a loaded base's files said of it, for the files of its adapters and merged models.

While a base trains, TRL changes its generation config, and PEFT writes the folder from which it was
loaded into the adapter, which is for other machines too.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel

    from finetune.model.published_names import PublishedNames

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class _Origin:
    """What is remembered of a base."""

    name: str
    """A hub id, or a folder's name without its path."""
    revision: str | None
    """Commit on the hub."""
    generation_config: "GenerationConfig | None"
    published_names: "PublishedNames | None"
    """Of a text model that was published in a model with other modalities."""


# Weak, so that the entry of a base ends with the base.
_origins: "WeakKeyDictionary[PreTrainedModel, _Origin]" = WeakKeyDictionary()


def remember_origin(
    base: "PreTrainedModel",
    source: BaseSource,
    names: "PublishedNames | None" = None,
) -> None:
    """Remember where a base was loaded from, its generation config and its layers' names there."""
    generation_config = copy.deepcopy(base.generation_config)
    _origins[base] = _Origin(
        source.public_name, source.revision, generation_config, names
    )


def published_names_of(base: "PreTrainedModel") -> "PublishedNames | None":
    """Return the names of a text model's layers in the model that it was published in."""
    origin = _origins.get(base)
    return None if origin is None else origin.published_names


def share_origin(base: "PreTrainedModel", skeleton: "PreTrainedModel") -> None:
    """Remember the same of another model of a base's shapes."""
    # The adapter of a slot is on such a model, and is saved from there.
    if base in _origins:
        _origins[skeleton] = _origins[base]


@contextlib.contextmanager
def public_base_name(model: "PeftModel") -> Iterator[None]:
    """Make PEFT name the base by its hub id and commit, or by its folder's name, in the block."""
    base = model.get_base_model()
    origin = _origins.get(base)
    if origin is None:
        yield
        return
    # The base stays loaded for other runs, so all of it is put back afterwards.
    locations = base.name_or_path, base.config.name_or_path
    configs = list(model.peft_config.values())
    recorded = [(config.base_model_name_or_path, config.revision) for config in configs]
    base.name_or_path = base.config.name_or_path = origin.name
    for config in configs:
        config.base_model_name_or_path = origin.name
        config.revision = origin.revision
    try:
        yield
    finally:
        base.name_or_path, base.config.name_or_path = locations
        for config, (name, revision) in zip(configs, recorded, strict=True):
            config.base_model_name_or_path = name
            config.revision = revision


def generation_config_with_ends(
    base: "PreTrainedModel", ends: Sequence[int]
) -> "GenerationConfig":
    """Return a base's generation config with the ends of answers that were learnt.

    Args:
        base: The base, without an adapter around it.
        ends: Token ids; those that the base stops at stay.
    """
    from transformers import GenerationConfig

    origin = _origins.get(base)
    loaded = origin.generation_config if origin else base.generation_config
    config = copy.deepcopy(loaded) or GenerationConfig()
    base_ends = _as_list(config.eos_token_id)
    config.eos_token_id = sorted({*ends, *base_ends})
    return config


def write_generation_config(config: "GenerationConfig", folder: Path) -> None:
    """Write `generation_config.json`.

    Not by its `save_pretrained`, which refuses settings that many bases are published with (a
    temperature without sampling).
    """
    config.to_json_file(folder / GENERATION_CONFIG)


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]
