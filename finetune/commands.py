"""The commands of the program by name, and what a user may have meant by another word."""

import difflib
from pathlib import Path

from finetune.config.paths import CONF

COMMANDS = (
    "evaluate",
    "export",
    "fetch",
    "generate",
    "merge",
    "plan",
    "preview",
    "publish",
)
"""Modules of `finetune` that are commands."""

_STUDY_COMMANDS = (
    "add",
    "best",
    "clone",
    "confirm",
    "diff",
    "list",
    "promote",
    "report",
    "show",
    "stop",
    "sweeps",
    "work",
    "watch",
)

_TRAINING_WORDS = ("finetune", "fit", "run", "start", "train")

_FLAGS = {
    "help": "--help",
    "hydra-help": "--hydra-help",
    "info": "--info",
    "multirun": "-m",
    "resume": "resume=RUN",
    "search": "-m hydra/sweeper=optuna",
    "sweep": "-m hydra/sweeper=optuna",
    "tune": "-m hydra/sweeper=optuna",
    "version": "--version",
}
"""Words, and what is typed for them after `python -m finetune`."""


def explain_word(word: str) -> str:
    """Return the line for a word of the command line that is no `key=value`."""
    name = word.lstrip("-")
    guess = _guess(name)
    if guess:
        return f"{word}: must be KEY=VALUE; did you mean {guess}?"
    if name and (CONF / name).is_dir():
        choices = [file.stem for file in (CONF / name).glob("*.yaml")]
        return f"{word}: must be GROUP=CHOICE; allowed: {', '.join(sorted(choices))}"
    if word and Path(word).exists():
        return f"{word}: must be KEY=VALUE; did you mean dataset.path={word}?"
    return f"{word}: must be KEY=VALUE; see --help"


def _guess(name: str) -> str | None:
    """Return the command line that a word stands for, exactly or misspelt."""
    command_lines = {}
    for word in _TRAINING_WORDS:
        command_lines[word] = "python -m finetune"
    for word, arguments in _FLAGS.items():
        command_lines[word] = f"python -m finetune {arguments}"
    for word in _STUDY_COMMANDS:
        command_lines[word] = f"python -m sweeps {word}"
    command_lines["sweeps"] = "python -m sweeps --help"
    for word in COMMANDS:
        command_lines[word] = f"python -m finetune.{word}"
    nearest = difflib.get_close_matches(name, command_lines, n=1, cutoff=0.7)
    return command_lines[nearest[0]] if nearest else None
