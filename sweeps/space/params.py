"""A search space as a YAML file has it, as Hydra's sweep syntax."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from finetune.config.convert import is_number
from finetune.errors import ConfigError
from sweeps.space.encoding import encode
from sweeps.space.long_form import is_long_form, tagged_sweep

SWEEP = re.compile(
    r"\b(choice|range|interval|tag|int|float|glob|shuffle|sort)\s*\(|^[^\[{'\"]*,"
)
"""Text in Hydra's sweep syntax: one of its functions, or values with commas between them."""

OLD_FORMS = ("categorical", "int", "float")
"""Types of hydra-optuna-sweeper's earlier search spaces: `{type: int, low: 1, high: 8}`."""


def plain_params(params: DictConfig, config: DictConfig) -> dict[str, Any]:
    """Return the sweep syntax, or the value, of each parameter of a search space.

    Nested keys become dotted ones, lists and the old form of hydra-optuna-sweeper sweep syntax.
    Interpolations of a single value stay, so that each trial resolves them.

    Args:
        params: the parameters, as YAML has them.
        config: the sweep's config, whose values tell a list of choices from a value that is a list.

    Raises:
        ConfigError: a parameter has a form that is not clear; the line has the right form.
    """
    written = OmegaConf.to_container(params, resolve=False)
    resolved = OmegaConf.to_container(params, resolve=True)
    assert isinstance(written, dict)
    assert isinstance(resolved, dict)
    texts: dict[str, Any] = {}
    written_values = dict(_parameters(written))
    for key, value in _parameters(resolved):
        if is_long_form(value):
            texts[key] = _long_form_text(key, value, written_values[key], config)
            continue
        text = _sweep_text(key, value, config)
        is_sweep = isinstance(text, str) and SWEEP.search(text)
        # The bounds and choices of a sweep are the same for all trials.
        texts[key] = text if is_sweep else written_values.get(key, text)
    return texts


def _parameters(
    values: Mapping[Any, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys; a mapping without a sweep in it is a value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_one_parameter = _is_old_form(value) or is_long_form(value)
        if isinstance(value, Mapping) and not is_one_parameter and _has_sweep(value):
            yield from _parameters(value, f"{name}.")
        else:
            yield name, value


def _has_sweep(value: Any) -> bool:
    if isinstance(value, Mapping):
        is_one_parameter = _is_old_form(value) or is_long_form(value)
        return is_one_parameter or any(map(_has_sweep, value.values()))
    return isinstance(value, list) or bool(
        isinstance(value, str) and SWEEP.search(value)
    )


def _is_old_form(value: Any) -> bool:
    if not isinstance(value, Mapping) or "type" not in value:
        return False
    return bool({"choices", "low", "high"} & value.keys())


def _long_form_text(
    key: str, value: Mapping[str, Any], written: Mapping[str, Any], config: DictConfig
) -> str:
    form = dict(value)
    if "variants" in written:
        # Their values are as they are written, so that each trial resolves them.
        form["variants"] = written["variants"]
    search = form.get("search")
    if search is not None:
        is_list = isinstance(search, list)
        form["search"] = (
            _choice(search) if is_list else _sweep_text(key, search, config)
        )
    return tagged_sweep(key, form)


def _sweep_text(key: str, value: Any, config: DictConfig) -> Any:
    if _is_old_form(value):
        return _old_form_text(key, value)
    if isinstance(value, list):
        return _list_text(key, value, config)
    return value


def _old_form_text(key: str, value: Mapping[str, Any]) -> str:
    kind = value["type"]
    if kind == "categorical" and isinstance(value.get("choices"), list):
        return _choice(value["choices"])
    low: Any = value.get("low")
    high: Any = value.get("high")
    step = value.get("step")
    if kind not in OLD_FORMS or not (is_number(low) and is_number(high)):
        raise ConfigError(
            f"{key}={dict(value)}: write choice(8, 16), interval(0.0, 0.1), "
            "tag(log, interval(1e-5, 1e-3)), or range(1, 4)"
        )
    if kind == "float":
        # Between two whole numbers, Hydra's intervals and ranges have whole numbers only.
        low, high = float(low), float(high)
    if step is not None:
        # Hydra's ranges end before their last number.
        return f"range({low},{high + step},{step})"
    text = f"interval({low},{high})"
    if kind == "int":
        text = f"int({text})"
    return f"tag(log,{text})" if value.get("log") else text


def _list_text(key: str, value: list[Any], config: DictConfig) -> Any:
    """Return a list as a choice, unless the config's own value shows that it may be a value."""
    config_value = OmegaConf.select(config, key.lstrip("+")) if "/" not in key else {}
    if is_number(config_value) or isinstance(config_value, bool | Mapping | DictConfig):
        return _choice(value)
    if isinstance(config_value, str):
        raise ConfigError(
            f"{key}={value}: to search, write {_choice(value)}; "
            f"a value that is a list stands in quotes: '{encode(value)}'"
        )
    return value


def _choice(values: list[Any]) -> str:
    items = ",".join(str(encode(value)) for value in values)
    return f"choice({items})"
