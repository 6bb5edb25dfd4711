"""A run that has ended, loaded from its folder: its config, and its adapter on its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.console import quiet_libraries
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.source import find_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedRun:
    """A run's base, ready to generate and to be measured, and then its adapter on it."""

    config: RunConfig
    folder: RunFolder
    tokenizer: "PreTrainedTokenizerBase"
    base: "PreTrainedModel"

    def with_adapter(self) -> "PeftModel":
        """The adapter on the base. The base itself is measured before: some adapters change it for good."""
        from peft import PeftModel

        model: PeftModel = PeftModel.from_pretrained(self.base, self.folder.adapter)
        model.eval()
        return model


def read_run_config(folder: str | Path) -> RunConfig:
    """The config that a run folder was trained with. Raises ConfigError where the folder holds no run."""
    known = read_json(RunFolder(folder).identity)
    if known is None:
        raise ConfigError(f"{folder}: is no run folder: it has no run.json")
    return RunConfig.from_dict(known["config"])


def load_run(folder: str | Path) -> TrainedRun:
    """A run's base. Raises ConfigError where the folder holds no run, or one without an adapter yet."""
    config, run = read_run_config(folder), RunFolder(folder)
    if not (run.adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: the run has no adapter yet; python -m finetune resume={folder} goes on with it")
    quiet_libraries()
    from finetune.model.loading import load_base, load_tokenizer

    source = find_base(config.model)
    return TrainedRun(config, run, load_tokenizer(source, config.model), load_base(source, config))
