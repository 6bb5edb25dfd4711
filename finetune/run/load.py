"""A run that has ended, loaded from its folder: its config, its base, its adapter."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compat import import_model_libraries
from finetune.config.schema import RunConfig
from finetune.console import quiet_libraries
from finetune.errors import ConfigError, is_out_of_memory_error, refusal
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.labels import Labels
from finetune.model.adapter_files import ADAPTER_CONFIG
from finetune.model.source import BaseSource, find_base
from finetune.quantities import counted
from finetune.run.interruption import resume_command
from finetune.run.spreading import with_visible_gpus

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Check = Callable[[RunConfig, "PreTrainedTokenizerBase"], object]


@dataclass(frozen=True)
class TrainedRun:
    """A finished run whose base is loaded."""

    config: RunConfig
    folder: RunFolder
    tokenizer: "PreTrainedTokenizerBase"
    base: "PreTrainedModel"

    def with_adapter(self) -> "PeftModel":
        """Put the adapter on the base. Some adapters change the base for good: use it before."""
        from finetune.model.adapter import attach_adapter

        model = attach_adapter(self.base, self.folder.adapter)
        model.eval()
        return model


def read_run_config(folder: str | Path) -> RunConfig:
    """Read the config that a run was trained with.

    Raises:
        ConfigError: The folder holds no run.
    """
    identity = read_json(RunFolder(folder).identity)
    if identity is None:
        raise ConfigError(f"{folder}: is no run folder: it has no run.json")
    return RunConfig.from_dict(identity["config"])


def read_labels(folder: RunFolder) -> Labels | None:
    """Read the labels that a run's training rows have; None without classification."""
    labels: Labels | None = (read_json(folder.result) or {}).get("labels")
    return labels


def read_trained_config(folder: str | Path) -> RunConfig:
    """Read the config of a run that has an adapter.

    Raises:
        ConfigError: The folder holds no run, or one without an adapter yet.
    """
    config = read_run_config(folder)
    if not (RunFolder(folder).adapter / ADAPTER_CONFIG).is_file():
        command = resume_command(RunFolder(folder))
        raise ConfigError(f"{folder}: the run has no adapter yet; {command} resumes it")
    return config


def load_run(folder: str | Path, check: Check | None = None) -> TrainedRun:
    """Load the base and the tokenizer of a run.

    Args:
        folder: The run folder.
        check: Raises ConfigError for input that the tokenizer refuses, before the base is loaded.

    Raises:
        ConfigError: The folder holds no run, or one without an adapter yet; or the base was spread
            over more GPUs than there are here, and does not fit.
    """
    # A folder without a run is refused before torch is imported below.
    config = read_trained_config(folder)
    run = RunFolder(folder)
    quiet_libraries()
    name = config.model.name_or_path
    log.info("loading %s, the base of %s", name, os.path.relpath(folder))
    import_model_libraries()
    from finetune.model.tokenizer import load_tokenizer

    source = find_base(config.model)
    tokenizer = load_tokenizer(source, config.model)
    if check is not None:
        check(config, tokenizer)
    return TrainedRun(
        config,
        run,
        tokenizer,
        _load_base(source, config),
    )


def _load_base(source: BaseSource, config: RunConfig) -> "PreTrainedModel":
    """Load a run's base, on as many GPUs as the run had or on those that there are."""
    from finetune.model.loading import load_base

    here = with_visible_gpus(config)
    try:
        return load_base(source, here)
    except Exception as error:
        if here == config or not is_out_of_memory_error(error):
            raise
    room = counted(int(here.trainer.gpus), "GPU")
    reason = f"the run's base does not fit here, on {room}"
    raise refusal("trainer.gpus", config.trainer.gpus, reason)
