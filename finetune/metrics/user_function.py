"""A metric of the user's: a function by its import path, checked before any model loads."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.config.user_module import import_user_module
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal
from finetune.metrics.judge import ask_judge
from finetune.metrics.metric import Metric

KEY = "evaluation.metrics"


def load_function(path: str, settings: EvaluationSettings) -> Metric:
    """Import a function, and read its attributes.

    Attributes: `higher_is_better` (true where it has none); `names`, of the scores that it returns
    in a mapping; `judge`, true where it scores one answer by asking a service, and so is called
    with one prediction, reference and row at a time.

    Args:
        path: The import path, as `my_module.score`.
        settings: How judges are called.

    Raises:
        ConfigError: There is no such function, or it can't be called as a metric.
    """
    function = _import(path)
    if not callable(function):
        raise refusal(KEY, path, f"is a {type(function).__name__}; must be a function")
    is_judge = _flag(path, function, "judge", default=False)
    higher_is_better = _flag(path, function, "higher_is_better", default=True)
    parameters = ("prediction", "reference", "row")
    if not is_judge:
        parameters = ("predictions", "references", "rows")
    _require_parameters(path, function, parameters)
    names = _names(path, function)
    score = function
    if is_judge:
        score = functools.partial(ask_judge, function, path, settings)
    return Metric(path, names, score, higher_is_better)


def _import(path: str) -> Any:
    """Import what a path names, with the working directory among the folders of modules."""
    module_name, _, name = path.rpartition(".")
    try:
        module = import_user_module(module_name)
    except ModuleNotFoundError as error:
        is_part = error.name and f"{module_name}.".startswith(f"{error.name}.")
        if not is_part:
            raise _broken(path, module_name, error) from error
        raise refusal(KEY, path, f"there is no module {error.name}") from None
    except (Exception, SystemExit) as error:
        raise _broken(path, module_name, error) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise refusal(KEY, path, f"the module {module_name} has no {name}") from None


def _broken(path: str, module: str, error: BaseException) -> ConfigError:
    reason = f"{type(error).__name__}: {summary_line(error)}"
    return refusal(KEY, path, f"the module {module} can't be imported ({reason})")


def _require_parameters(
    path: str, function: Callable[..., Any], parameters: tuple[str, ...]
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions in C have none.
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        expected = f"must take ({', '.join(parameters)}), but takes {signature}"
        raise refusal(KEY, path, expected) from None


def _flag(path: str, function: Any, name: str, default: bool) -> bool:
    value = getattr(function, name, default)
    if not isinstance(value, bool):
        raise refusal(KEY, path, f"its attribute {name} must be True or False")
    return value


def _names(path: str, function: Any) -> tuple[str, ...]:
    """The names of a function's scores; its own name where it gives none."""
    names = getattr(function, "names", None)
    if names is None:
        return (path.rpartition(".")[2],)
    are_texts = isinstance(names, list | tuple) and all(
        isinstance(name, str) and name for name in names
    )
    if not are_texts or not names:
        raise refusal(KEY, path, "its attribute names must be a list of texts")
    return tuple(names)
