"""The settings of a sweep command, read from `hydra.sweeper` and checked."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from finetune.config.schema import RunConfig
from finetune.config.secrets import STORAGE_KEY, refuse_secrets_in
from finetune.errors import ConfigError, refusal
from finetune.metrics.load import higher_is_better
from finetune.metrics.metric import Metric
from sweeps.space.params import plain_params
from sweeps.space.settings import Direction, StudySettings
from sweeps.space.user_class import without_choice_arguments


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sweeper's arguments without OmegaConf's types."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
        plain[key] = value
    return plain


def search_params(config: DictConfig) -> dict[str, Any]:
    """Return `hydra.sweeper.params`, or else those of the chosen search space."""
    params = config.hydra.sweeper.get("params")
    # The group `search` stands apart: a plain multirun, whose sweeper has no such parameters,
    # would fail with a space in `hydra.sweeper.params`.
    if params is None:
        params = OmegaConf.select(config, "search.params")
    if params is None:
        return {}
    return plain_params(params, config)


def check_settings(
    config: DictConfig, plain: Mapping[str, Any], params: dict[str, Any]
) -> StudySettings:
    """Check the settings; they keep the storage's address unresolved, without secrets."""
    written = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    assert isinstance(written, dict)
    written_address = written["storage"]
    refuse_secrets_in(f"{STORAGE_KEY}={written_address}")
    study_name = plain.get("study_name")
    if study_name is None:
        study_name = time.strftime("%Y-%m-%d_%H-%M-%S")
    choices = config.hydra.runtime.choices
    for group, example in (("sampler", "tpe"), ("pruner", "none")):
        key = f"hydra.sweeper.{group}"
        choice_key = key.replace(".", "/")
        if not isinstance(plain[group], Mapping):
            allowed = f"is chosen by its group, as {choice_key}={example}"
            raise refusal(key, plain[group], allowed)
        choice = str(choices.get(choice_key))
        plain = {**plain, group: without_choice_arguments(key, choice, plain[group])}
    values = {
        **plain,
        "study_name": study_name,
        "storage": written_address,
        "params": params,
    }
    return StudySettings.from_sweeper(values)


def resolve_directions(
    settings: StudySettings, config: RunConfig, metrics: Sequence[Metric]
) -> StudySettings:
    """Return the settings with a direction for each objective, which its metric allows."""
    rising = [higher_is_better(name, metrics) for name in config.objectives]
    if settings.direction == "auto":
        directions: list[Direction] = [
            "maximize" if is_rising else "minimize" for is_rising in rising
        ]
        return dataclasses.replace(settings, direction=directions)
    # Not strict: a wrong number of directions is refused below, with the names.
    for name, is_rising, direction in zip(
        config.objectives, rising, settings.directions, strict=False
    ):
        if is_rising and direction == "minimize":
            reason = f"{name} is better the larger it is: maximize"
            raise refusal("hydra.sweeper.direction", direction, reason)
    count = len(config.objectives)
    if count != len(settings.directions):
        names = ", ".join(config.objectives)
        reason = f"must be one for each objective ({count}: {names})"
        raise ConfigError(f"hydra.sweeper.direction={settings.direction}: {reason}")
    return settings
