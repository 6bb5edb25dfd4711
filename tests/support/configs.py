"""Compose configs, and the overrides of a run or a study that takes seconds."""

import copy
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.paths import CONF
from finetune.config.schema import RunConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(*overrides: str) -> RunConfig:
    """Compose and check the config of a command line.

    Reading the files takes Hydra 0.1 s, so it is done once for the same groups. The values are then
    set by the function with which Hydra itself sets them.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = [word for word in overrides if _is_value(word)]
    composed = copy.deepcopy(
        _compose_groups(*(word for word in overrides if word not in values))
    )
    parsed = OverridesParser.create().parse_overrides(values)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, composed)
    return RunConfig.from_hydra(composed)


def compose_whole(*overrides: str) -> "DictConfig":
    """Compose a command line by Hydra alone."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return hydra_compose("config", list(overrides))


_compose_groups = functools.cache(compose_whole)


def _is_value(override: str) -> bool:
    """Whether an override sets a key to a value, and chooses no file."""
    key = re.match(r"\+{0,2}([\w.]+)=", override)
    return (
        key is not None
        and not key[1].startswith("hydra.")
        and not (CONF / key[1]).is_dir()
    )


def tiny_overrides(tiny_base: Path) -> list[str]:
    """Return the overrides of a run that takes seconds."""
    return [
        f"model.name_or_path={tiny_base}",
        "tracker=none",
        "dataset.limit=24",
        "dataset.eval_fraction=0.02",
        "dataset.test_fraction=0.02",
        "sample_max_length=64",
        "trainer.logging_steps=1",
    ]


def study_overrides(tiny_base: Path, name: str) -> list[str]:
    """Return the arguments of a study whose trials take about a second."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.study_name={name}",
        *tiny_overrides(tiny_base),
        "quantization=none",
        "dataset.max_length=64",
        "sample_prompts=[]",
        "trainer.max_steps=3",
    ]
