"""The command `work`: workers of this machine join a study, and leave it at any time."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.addresses import refuse_secrets_in_address, show_address
from finetune.config.secrets import STORAGE_KEY
from finetune.console import quiet_libraries
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.files.find_run import STUDIES
from sweeps.study.find_study import find_search

if TYPE_CHECKING:
    from sweeps.study.stored_command import StoredCommand
    from sweeps.study.study import Study


def work(arguments: argparse.Namespace) -> None:
    """Train trials of a study until none is left to begin."""
    study, address = _find_study(arguments.study, arguments.storage)
    # Loads Optuna: after a wrong name is refused.
    from sweeps.study.stored_command import read_command

    command = read_command(study)
    words = _words(study, command, address, arguments.override)
    # Where the command ran on this machine, its relative paths are found from there.
    is_here = arguments.storage is None and Path(command.working_directory).is_dir()
    # As the user of this command sees it.
    shown_folder = os.path.relpath(study.folder)
    if is_here:
        os.chdir(command.working_directory)
    _run(words)
    if arguments.json:
        counts = {"study": study.name, "folder": shown_folder}
        arguments.print_json({**counts, "finished": len(study.finished())})


def _find_study(name: str, storage: str | None) -> "tuple[Study, str | None]":
    """Return a study, and its storage's address as a user writes it.

    Args:
        name: its folder, its name or `latest`; with an address its name.
        storage: the address of its database, where the folder is not here.
    """
    if storage is None:
        study = find_search(name)
        entry = read_json(study.folder / "study.json") or {}
        return study, entry["storage"]
    refuse_secrets_in_address(STORAGE_KEY, storage)
    from sweeps.study.storage import check_address, resolve_address
    from sweeps.study.study import Study

    address = resolve_address(storage)
    check_address(address, workers=1)
    folder = (STUDIES / name).absolute()
    try:
        return Study(folder, name, address), storage
    except KeyError:
        shown = show_address(STORAGE_KEY, address or "")
        raise ConfigError(f"{name}: no such study in {shown}") from None


def _words(
    study: "Study",
    command: "StoredCommand",
    address: str | None,
    values: list[str],
) -> list[str]:
    """Return the command line with which this machine joins a study."""
    from sweeps.space.encoding import encode
    from sweeps.study.stored_command import OF_THE_MACHINE

    for value in values:
        if not value.startswith(OF_THE_MACHINE):
            allowed = ", ".join(OF_THE_MACHINE)
            reason = f"the study's config is its own; allowed: {allowed}"
            raise ConfigError(f"{value}: {reason}")
    words = command.words(study.name, study.folder, "sweeps.sweeper.JoiningSweeper")
    words += values
    if address is not None:
        words.append(f"{STORAGE_KEY}={encode(address)}")
    return words


def _run(words: list[str]) -> None:
    """Run the application of runs and studies with a command line."""
    from hydra.core.plugins import Plugins

    from finetune.__main__ import resume, task
    from finetune.app import run_app
    from sweeps.sweeper import JoiningSweeper

    quiet_libraries(bars=False)
    # The package registers the sweeper that begins studies; nobody chooses this one in a config.
    Plugins.instance().register(JoiningSweeper)
    sys.argv[1:] = words
    run_app(task, resume)
