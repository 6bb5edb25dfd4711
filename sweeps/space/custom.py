"""A user's function that suggests further parameters: loaded, and asked for the config's values."""

import logging
from collections.abc import Callable
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from finetune.config.flatten import flatten
from finetune.config.user_module import add_working_directory
from finetune.console import error_line, summary_line
from finetune.errors import refusal
from sweeps.space.distributions import contains, describe
from sweeps.space.encoding import encode
from sweeps.space.space import Point, Space

log = logging.getLogger(__name__)


def load_function(
    path: str, key: str = "hydra.sweeper.custom_search_space"
) -> Callable[..., object]:
    """Import a user's function, with the working directory among the folders of modules.

    Args:
        path: its import path.
        key: the config key that names it, for the error.

    Raises:
        ConfigError: there is no such function.
    """
    add_working_directory()
    try:
        # Hydra's own look-up, as in hydra-optuna-sweeper: it finds a method of a class, too.
        function: Callable[..., object] = get_method(path)
    except Exception as error:
        reason = f"no such function ({summary_line(error)})"
        raise refusal(key, path, reason) from error
    return function


def extend_baseline(
    path: str, config: DictConfig, space: Space, point: Point, composed: DictConfig
) -> Point | None:
    """Add the config's own values of what a user's function suggests.

    Args:
        path: the function's import path.
        config: the sweep's config, which the function receives.
        space: the space.
        point: the config's own values of the searched parameters.
        composed: the config of a trial before anything is searched.

    Returns:
        The baseline's point; None if the config has no value of its own for what the function
        suggests, or one outside of that. A line in the log says which.
    """
    trial = FixedTrial({**_own_values(composed), **point})
    outside = space.outside(point)
    space.suggest(trial, outside)
    function = load_function(path)
    try:
        function(config, trial)
    # What a user's function raises is not known; for a value that can't be it is a ValueError.
    except Exception as error:
        name = str(error.args[0]) if isinstance(error, KeyError) else None
        if name in outside:
            message = (
                "no baseline: %s=%s: the config's own value lies outside the space, and "
                "custom_search_space reads it"
            )
            log.info(message, name, outside[name])
            return None
        log.info("no baseline: custom_search_space: %s", error_line(error))
        return None
    for name, distribution in trial.distributions.items():
        if not isinstance(distribution, IntDistribution | FloatDistribution):
            continue
        value = trial.params[name]
        if not contains(distribution, value):
            described = describe(distribution)
            message = "no baseline: %s=%s: the config's own value lies outside %s"
            log.info(message, name, value, described)
            return None
    return {**trial.params, **outside}


def _own_values(composed: DictConfig) -> dict[str, Any]:
    """Return the config's own values by the names that a function may suggest them under."""
    keys = [str(key) for key in composed if key != "hydra"]
    run_config = OmegaConf.masked_copy(composed, keys)
    plain: Any = OmegaConf.to_container(run_config, resolve=True)
    values: dict[str, Any] = {}
    for key, value in flatten(plain).items():
        encoded = encode(value) if isinstance(value, list) else value
        for prefix in ("", "+", "++"):
            values[f"{prefix}{key}"] = encoded
    # The value of a config group is the name of its choice.
    return {**values, **composed.hydra.runtime.choices}
