"""The command of a study, stored with it, so that workers elsewhere compose the same trials.

Stored is what was typed, not what it was composed to: a searched group is composed for each trial.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from finetune.errors import ConfigError
from sweeps.space.encoding import encode
from sweeps.study.study import Study

COMMAND = "command"
"""The study attribute that holds the command of its last session."""

OF_THE_MACHINE = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra.sweeper.gpus_per_worker",
    "hydra.sweeper.n_jobs",
    "hydra.sweeper.timeout",
)
"""Beginnings of the keys that each machine has for itself."""

_OF_THE_SESSION = (
    "hydra.mode",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweeper.allow_change",
    "hydra.sweeper.confirm",
    "hydra.sweeper.detach",
    "hydra.sweeper.storage",
    "hydra.sweeper.study_name",
    "hydra.sweeper.warm_start",
)
"""Beginnings of the keys that only the command itself needs."""


OF_THE_JOBS = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra.mode",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweeper.detach",
    "hydra.sweeper.n_jobs",
    "hydra.sweeper.study_name",
)
"""Beginnings of the keys that the jobs of a queue have for themselves."""


@dataclass(frozen=True)
class StoredCommand:
    """What a study's trials are composed from."""

    overrides: list[str]
    """The overrides, without those of the machine and of the session."""
    config_name: str
    config_folders: list[str]
    """The folders of `--config-dir`."""
    working_directory: str
    """Where relative paths begin."""

    def words(self, study_name: str, folder: Path, sweeper: str) -> list[str]:
        """Return the words of a command line for the same study, in a folder, by a sweeper."""
        words = [
            "-m",
            *self.overrides,
            f"hydra.sweeper.study_name={encode(study_name)}",
            f"hydra.sweep.dir={encode(str(folder))}",
            f"hydra.sweeper._target_={sweeper}",
        ]
        if self.config_name != "config":
            words.append(f"--config-name={self.config_name}")
        for place in self.config_folders:
            words.append(f"--config-dir={place}")
        return words


def command_of(
    config: DictConfig, arguments: Sequence[str], excluded: Sequence[str]
) -> StoredCommand:
    """Return the command of a session.

    Args:
        config: the sweep's config, with the node `hydra`.
        arguments: the overrides that are not of Hydra.
        excluded: beginnings of keys that are left out.
    """
    hydra = config.hydra
    overrides = []
    for override in (*arguments, *hydra.overrides.hydra):
        if not override.lstrip("+~").startswith(tuple(excluded)):
            overrides.append(override)
    folders = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            folders.append(source.path)
    return StoredCommand(
        overrides, hydra.job.config_name, folders, working_directory=hydra.runtime.cwd
    )


def store_command(study: Study, config: DictConfig, arguments: Sequence[str]) -> None:
    """Store the command of a session. The arguments are those of `command_of`."""
    excluded = (*OF_THE_MACHINE, *_OF_THE_SESSION)
    command = dataclasses.asdict(command_of(config, arguments, excluded))
    if study.optuna.user_attrs.get(COMMAND) != command:
        study.optuna.set_user_attr(COMMAND, command)


def read_command(study: Study) -> StoredCommand:
    """Return the command of a study.

    Raises:
        ConfigError: an earlier version began the study, or a folder of configs is not here.
    """
    stored: dict[str, Any] | None = study.optuna.user_attrs.get(COMMAND)
    if stored is None:
        reason = "an earlier version began it, and stored no command"
        advice = "the command that began it joins it"
        raise ConfigError(f"study {study.name}: {reason}; {advice}")
    command = StoredCommand(**stored)
    for folder in command.config_folders:
        if not Path(folder).is_dir():
            reason = f"its --config-dir {folder} is not on this machine: copy it there"
            raise ConfigError(f"study {study.name}: {reason}")
    return command
