"""Write `best/`, a copy of the winner's run, and `experiment/best.yaml`, its config."""

import dataclasses
import os
import shlex
import shutil
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import FrozenTrial

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json, replace_folder
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from sweeps.study.study import Study

NOT_COPIED = ("checkpoints", "wandb", "tensorboard", ".lock")
"""Entries of the run folder that `best/` does not need."""


def write_best(study: Study, winner: FrozenTrial, run: RunFolder) -> None:
    """Write the winner's run folder and config into the study's folder.

    Args:
        study: the study.
        winner: the winning trial.
        run: the run whose adapter is taken: the trial's own, or one of its repeats.
    """
    _copy_run(study, run)
    config = dataclasses.replace(read_run_config(run.path), resume=None)
    config = _with_commit(config, run)
    experiment = study.folder / "experiment" / "best.yaml"
    experiment.parent.mkdir(exist_ok=True)
    folder = shlex.quote(os.path.relpath(study.folder))
    head = (
        "# @package _global_\n"
        f"# The whole config of trial {winner.number} of study {study.name}:\n"
        f"# python -m finetune --config-dir {folder} experiment=best\n"
    )
    values = OmegaConf.create(_escaped_values(config))
    text = OmegaConf.to_yaml(values)
    experiment.write_text(head + text, encoding="utf-8")


def _with_commit(config: RunConfig, run: RunFolder) -> RunConfig:
    """Return the config with the commit of a base from the hub, so that a rerun takes the same."""
    identity = read_json(run.identity) or {}
    base = identity.get("base_model") or {}
    if base.get("revision") is None:
        return config
    model = dataclasses.replace(config.model, revision=base["revision"])
    return dataclasses.replace(config, model=model)


def _copy_run(study: Study, run: RunFolder) -> None:
    unneeded = shutil.ignore_patterns(*NOT_COPIED)
    # An earlier best/ stays until the copy is complete.
    with replace_folder(study.folder / "best") as draft:
        shutil.copytree(run.path, draft, ignore=unneeded)


def _escaped_values(config: RunConfig) -> dict[str, Any]:
    """Return the config's values with `${` escaped, so that they are not resolved twice."""
    values: dict[str, Any] = _escape(config.to_dict())
    return values


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "\\${")
    return value
