"""The overrides of a sweep: parsed as Hydra does, and checked for what no search may vary."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.errors import HydraException

from finetune.errors import ConfigError
from sweeps.space.encoding import encode

NOT_SEARCHABLE = (
    r"\+*(dataset(?!\.limit\b)|objective|objective_at|name|resume|trainer\.engine|tracker|hub"
    r"|search|hydra)\b.*"
)
"""Parameters that no search may vary.

Trials would be evaluated on other rows or by another objective, or would store results elsewhere.
"""

SEED_REASON = (
    "can't be searched: the best seed would win by luck; search without it, and "
    "python -m sweeps confirm STUDY trains the best trials with further seeds"
)
"""Why trials that differ only by their seed are no points of a space."""

RELATIVE = "relative"
"""A tag: `tag(log, relative, interval(0.1, 10))` is in multiples of the config's own value."""


def parse_overrides(
    params: Mapping[str, Any], arguments: Sequence[str]
) -> list[Override]:
    """Parse overrides as Hydra does. A glob over a config group needs an initialized Hydra.

    Args:
        params: the sweep syntax, or the value, of each parameter.
        arguments: overrides of the command line.

    Returns:
        The overrides of `params`, then those of the command line.

    Raises:
        ConfigError: an override can't be parsed.
    """
    texts = []
    for name, value in params.items():
        texts.append(f"{name}={_as_text(value)}")
    hydra = GlobalHydra.instance()
    # The loader lists the options of a config group, from which a glob chooses.
    config_loader = hydra.config_loader() if hydra.is_initialized() else None
    parser = OverridesParser.create(config_loader)
    overrides: list[Override] = []
    # One at a time, so that an error can name the override.
    for text in [*texts, *arguments]:
        try:
            overrides += parser.parse_overrides([text])
        except HydraException as error:
            reason = _advice(text) or _parser_reason(error)
            raise ConfigError(f"{text}: {reason}") from None
    return overrides


def _advice(text: str) -> str | None:
    """Say how to write a search that Hydra does not parse, for the common mistakes."""
    name, _, value = text.partition("=")
    call = re.fullmatch(r"choice\((.*)\)", value.strip(), re.DOTALL)
    items = call[1].split(",") if call else [value]
    if call and "null" in [item.strip() for item in items]:
        return f"choice takes no null; write {name}={call[1]}"
    if "=" not in value or any(character in "".join(items) for character in "'\"([{"):
        return None
    quoted = [f"'{item.strip()}'" if "=" in item else item for item in items]
    joined = ",".join(quoted)
    return f"a value with = stands in quotes; write {name}=" + (
        f"choice({joined})" if call else joined
    )


def refuse_quoted_list(override: Override, values: Iterable[Any]) -> None:
    """Refuse a list in quotes, which is text to Hydra.

    Args:
        override: the override, for the error.
        values: its encoded values, in quotes where they are text that Hydra reads otherwise.

    Raises:
        ConfigError: one of them is a list in quotes.
    """
    parser = OverridesParser.create()
    for value in values:
        quoted = re.fullmatch(r"'(\[.*\])'", str(value), re.DOTALL)
        if quoted is None:
            continue
        try:
            parsed = parser.parse_overrides([f"key={quoted[1]}"])
        except HydraException:
            continue
        if isinstance(parsed[0].value(), list):
            reason = f"a list in quotes is text; write {quoted[1]} without them"
            raise ConfigError(f"{override.input_line}: {reason}")


def _as_text(value: Any) -> str:
    """Return a value as the right side of an override; text is sweep syntax already."""
    return value if isinstance(value, str) else str(encode(value))


def _parser_reason(error: HydraException) -> str:
    """Return what Hydra's parser has to say, without its lines of boilerplate."""
    boilerplate = ("Error when parsing", "Error parsing", "See https")
    lines = str(error).splitlines()
    reasons = [line for line in lines if not line.startswith(boilerplate)]
    return " ".join(reasons)


def is_relative(override: Override) -> bool:
    """Whether an override is an interval of multiples.

    Raises:
        ConfigError: the tag is on anything but an interval.
    """
    sweep = override.value()
    if not isinstance(sweep, Sweep) or RELATIVE not in sweep.tags:
        return False
    if not isinstance(sweep, IntervalSweep):
        reason = "the tag relative is for an interval, as interval(0.1, 10)"
        raise ConfigError(f"{override.input_line}: {reason}")
    return True


def require_searchable(names: Iterable[str]) -> None:
    """Refuse parameters that no search may vary.

    Raises:
        ConfigError: names the first of them.
    """
    for name in names:
        if name.lstrip("+") == "seed":
            raise ConfigError(f"{name}: {SEED_REASON}")
        if re.fullmatch(NOT_SEARCHABLE, name):
            raise ConfigError(
                f"{name}: can't be searched: all trials of a study are evaluated by the same "
                "objective on the same rows"
            )
