"""Studies whose trials are written down, not run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf

from finetune.config.paths import CONF
from sweeps.space.settings import StudySettings
from sweeps.study.study import Study


def sweeper_config(*overrides: str) -> DictConfig:
    """The composed config of a sweep, Hydra's part included."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return compose("config", ["hydra/sweeper=optuna", *overrides], return_hydra_config=True)


def settings_of(*overrides: str) -> StudySettings:
    values = OmegaConf.to_container(sweeper_config(*overrides).hydra.sweeper, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items() if key != "_target_"}
    return StudySettings.from_sweeper(plain | {"study_name": "s", "params": plain["params"] or {}})


def made_study(folder: Path, trials: Sequence[Any], *objectives: str, direction: str = "minimize") -> Any:
    """A study of trials that are written down, not run."""

    from sweeps.study.storage import open_storage

    folder.mkdir(parents=True)
    names = list(objectives) or ["eval/loss"]
    study = optuna.create_study(
        study_name=folder.name, storage=open_storage(None, folder), directions=[direction] * len(names)
    )
    study.set_user_attr("uid", "made")
    study.set_user_attr("terms", {"objective": names[0] if len(names) == 1 else names})
    study.add_trials(trials)
    (folder / "study.json").write_text(json.dumps({"name": folder.name, "storage": None}))
    return Study.load(folder)
