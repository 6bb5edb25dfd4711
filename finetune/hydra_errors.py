"""Errors of Hydra and OmegaConf as one line for the user."""

import re
from collections.abc import Sequence

from finetune.commands import explain_word
from finetune.config.keys import SEARCH_COMMAND, group_names, unknown_key
from finetune.config.paths import CONF
from finetune.errors import did_you_mean, join_lines

HYDRA_NOISE = (
    "provider=",
    "full_key:",
    "object_type=",
    "reference_type=",
    "Config search path",
    "Set the environment",
)
"""Beginnings of lines in messages of Hydra and OmegaConf that tell a user nothing."""


SWEEP_WITHOUT_MULTIRUN = re.compile(
    r"(Ambiguous value for argument|Sweep parameters) '(?P<override>.*)'( requires --multirun)?$",
    re.MULTILINE,
)
"""Hydra's messages about sweep syntax without -m."""


SWEPT_SETTING = re.compile(
    r"Sweeping over Hydra's configuration is not supported : '(?P<override>.*)'"
)
"""Hydra's message about several values of a key that the whole sweep shares."""


UNPARSED_OVERRIDE = re.compile(
    r"Error when parsing index: \d+, string: (?P<override>.*?) out of \[", re.DOTALL
)
"""Hydra's message about an override that is against its grammar."""

WRONG_CALL = re.compile(r"while evaluating '.*?': (?!Unknown function)(?P<reason>.*)")
"""Hydra's message about one of its functions with wrong arguments: `choice()`."""


_PATH_KEYS = {"dataset": "dataset.path", "model": "model.name_or_path"}
"""Groups whose key takes any path or hub id."""


_EXTRAS = {
    "ray": "ray",
    "ray_aws": "ray",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}
"""The extras that bring launchers."""


def hydra_error_line(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf as one line, with the nearest names."""
    from hydra.errors import MissingConfigException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        missing = str(error.missing_cfg_file or "")
        if "/" in missing:
            return _choice_refusal(missing, error.options)
    unknown = re.search(r"Could not override '([^']*)'", text)
    if unknown:
        return unknown_key(unknown[1])
    sweep = SWEEP_WITHOUT_MULTIRUN.search(text)
    if sweep:
        return _sweep_refusal(sweep["override"])
    setting = SWEPT_SETTING.search(text)
    if setting:
        key, _, values = setting["override"].partition("=")
        one = f"{key}={_first(values)}"
        return f"{key}={values}: must be one value for all runs of a sweep, as {one}"
    unparsed = UNPARSED_OVERRIDE.search(text)
    if unparsed:
        wrong_call = WRONG_CALL.search(text)
        if wrong_call:
            return f"{join_lines(unparsed['override'])}: {wrong_call['reason']}"
        return _syntax_refusal(unparsed["override"])
    lines = [join_lines(line) for line in text.splitlines() if line.strip()]
    cause = str(error.__cause__ or "").splitlines()
    if cause and cause[0] not in text:
        lines.append(cause[0])
    shown_lines = []
    for line in lines:
        if not line.startswith(HYDRA_NOISE):
            shown_lines.append(line.rstrip(".;"))
    return "; ".join(shown_lines)


def _choice_refusal(missing: str, choices: Sequence[str]) -> str:
    """Return the error for a choice that a group does not have.

    Args:
        missing: group and choice, as in `lora/target/qv`; a choice may be a path with slashes.
        choices: the group's choices.
    """
    groups = [group for group in group_names() if missing.startswith(f"{group}/")]
    group = max(groups, key=len, default=missing.rpartition("/")[0])
    choice = missing.removeprefix(f"{group}/")
    refused = f"{group}={choice}"
    if group == "hydra/launcher" and choice in _EXTRAS:
        extra = f'pip install "qlora-sweeps[{_EXTRAS[choice]}]"'
        return f"{refused}: its package is not installed: {extra}"
    key = _PATH_KEYS.get(group)
    if key and re.search(r"[./~]", choice):
        return f"{refused}: no such choice; did you mean {key}={choice}?"
    return f"{refused}: no such choice; {did_you_mean(choice, choices)}"


def _sweep_refusal(override: str) -> str:
    """Return the error for sweep syntax on the command line of a single run."""
    key, _, values = override.partition("=")
    if "interval(" in values:
        return f"{override}: a range needs {SEARCH_COMMAND}"
    remedy = "several values need python -m finetune -m"
    is_group = (CONF / key).is_dir()
    if not is_group and "(" not in values:
        remedy += f"; one list is {key}=[{values}]"
    return f"{override}: {remedy}"


def _first(values: str) -> str:
    """Return the first of several values, as `choice(1,2)` or `1,2` have them."""
    inner = re.fullmatch(r"\w+\((.*)\)", values)
    return (inner[1] if inner else values).partition(",")[0].strip()


def _syntax_refusal(override: str) -> str:
    """Return the error for an override that Hydra can't parse."""
    key, equals, value = override.partition("=")
    if not equals:
        return explain_word(override)
    remedy = "text with special characters needs quotes"
    if not set(value) & set("'\"\\$\n"):
        remedy += f": '{key}=\"{value}\"'"
    return f"{join_lines(override)}: is not Hydra's syntax; {remedy}"
