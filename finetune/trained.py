"""A run that has ended, loaded from its folder: its config, and its adapter on its base."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli import quiet_libraries
from finetune.config import ConfigError, RunConfig
from finetune.hub import find_base
from finetune.records import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedRun:
    """A run's adapter on its base, ready to generate and to be measured."""

    config: RunConfig
    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"

    def without_adapter(self, wanted: bool = True) -> contextlib.AbstractContextManager[None]:
        """The base alone, while the context lasts."""
        return self.model.disable_adapter() if wanted else contextlib.nullcontext()


def read_run_config(folder: str | Path) -> RunConfig:
    """The config that a run folder was trained with. Raises ConfigError where the folder holds no run."""
    from omegaconf import OmegaConf

    composed = Path(folder) / ".hydra" / "config.yaml"
    if not composed.is_file():
        raise ConfigError(f"{folder}: is no run folder: it has no .hydra/config.yaml")
    values = OmegaConf.load(composed)
    assert not isinstance(values, list)
    return RunConfig.from_hydra(values)  # type: ignore[arg-type]


def load_run(folder: str | Path) -> TrainedRun:
    """A run's base and adapter. Raises ConfigError where the folder holds no run, or one without an adapter yet."""
    config, run = read_run_config(folder), RunFolder(folder)
    if not (run.adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: the run has no adapter yet; python -m finetune resume={folder} goes on with it")
    quiet_libraries()
    from peft import PeftModel

    from finetune.base import load_base, load_tokenizer

    source = find_base(config.model)
    model = PeftModel.from_pretrained(load_base(source, config), run.adapter)
    model.eval()
    return TrainedRun(config, model, load_tokenizer(source, config.model))
