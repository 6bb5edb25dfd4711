"""Samplers and pruners by the import path that `_target_` names: Optuna's, and a user's own.

Whoever writes `_target_` decides that its code runs, so any class of the right kind may stand
there, and any function that returns one.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from finetune.config.paths import CONF
from finetune.config.user_module import import_user_module
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal

Arguments = Mapping[str, Any]


def load_target(key: str, path: str) -> Callable[..., Any]:
    """Import what `_target_` names, with the working directory among the folders of modules.

    Args:
        key: the config key of the sampler or pruner.
        path: the import path, as `my_module.MySampler`.

    Raises:
        ConfigError: there is no such class or function.
    """
    target_key = f"{key}._target_"
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise refusal(target_key, path, "must be an import path, as my_module.MyClass")
    try:
        module = import_user_module(module_name)
    # What a user's module raises is not known.
    except Exception as error:
        reason = f"{module_name} can't be imported ({_describe(error)})"
        raise refusal(target_key, path, reason) from error
    target: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(target):
        reason = f"{module_name} has no class or function {name}"
        raise refusal(target_key, path, reason)
    return target


def make_instance(key: str, arguments: Arguments, base: type, **objects: Any) -> Any:
    """Make a sampler or a pruner from its arguments.

    Args:
        key: the config key of the sampler or pruner.
        arguments: `_target_` and the arguments.
        base: Optuna's base class of the kind.
        objects: further arguments that no config can hold.

    Returns:
        An instance of the base class.

    Raises:
        ConfigError: there is no such class or function, it fails, or it makes something else.
    """
    path = str(arguments["_target_"])
    target = load_target(key, path)
    allowed = f"must be a {base.__name__} of Optuna, or a function that returns one"
    # A class of another kind is not called.
    if isinstance(target, type) and not issubclass(target, base):
        raise refusal(f"{key}._target_", path, allowed)
    try:
        # Hydra asks for a list of what may be called: all that the user has written.
        make = instantiate(
            {**arguments, "_partial_": True},
            _execution_whitelist_=list(_targets(arguments)),
        )
        instance = make(**objects)
    # What a user's class raises is not known.
    except Exception as error:
        is_hydras = isinstance(error, InstantiationException)
        cause = (error.__cause__ if is_hydras else None) or error
        raise ConfigError(f"{key}: {path}: {_describe(cause)}") from error
    if not isinstance(instance, base):
        reason = f"returns a {type(instance).__name__}; {allowed}"
        raise refusal(f"{key}._target_", path, reason)
    return instance


def accepts(target: Callable[..., Any], name: str) -> bool:
    """Whether a class or function takes an argument of a name."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        # Some functions in C have no signature.
        return True
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    return takes_all or name in parameters


def without_choice_arguments(
    key: str, choice: str, arguments: Arguments
) -> dict[str, Any]:
    """Leave out the arguments of a chosen YAML that another class does not take.

    `hydra.sweeper.sampler._target_=my_module.MySampler` replaces the class of the chosen YAML, and
    leaves that class's arguments.

    Args:
        key: the config key of the sampler or pruner.
        choice: the chosen YAML of its group.
        arguments: `_target_` and all arguments.

    Raises:
        ConfigError: there is no such class or function.
    """
    file = CONF / key.replace(".", "/") / f"{choice}.yaml"
    if not file.exists():
        return dict(arguments)
    of_choice: Any = OmegaConf.to_container(OmegaConf.load(file))
    path = arguments.get("_target_")
    if path == of_choice["_target_"]:
        return dict(arguments)
    target = load_target(key, str(path))
    remaining = {}
    for name, value in arguments.items():
        is_of_choice = name in of_choice and of_choice[name] == value
        if not is_of_choice or name == "_target_" or accepts(target, name):
            remaining[name] = value
    return remaining


def _targets(value: Any) -> Iterator[str]:
    """Yield the `_target_` of some arguments, and of those inside them."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for item in value.values():
            yield from _targets(item)
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {summary_line(error)}"
