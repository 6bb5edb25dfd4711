"""W&B's environment variables in the arguments of `wandb.init`."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.files.run_folder import RunFolder
from finetune.tracking import wandb_arguments
from finetune.tracking.tracker import Label
from finetune.tracking.wandb_arguments import init_arguments

Tiny = Callable[..., RunConfig]

TRIAL = Label("abc-0", "s1-0", "s1", "trial")


@pytest.mark.parametrize(
    ("variable", "value", "argument", "alone", "in_study"),
    [
        ("WANDB_TAGS", "a, b", "tags", ["a", "b", "first"], ["a", "b", "first"]),
        ("WANDB_JOB_TYPE", "night", "job_type", "night", "trial"),
        ("WANDB_RUN_ID", "mine", "id", "mine", "abc-0"),
        ("WANDB_DIR", "/tmp/w", "dir", "/tmp/w", "/tmp/w"),
        ("WANDB_DISABLED", "true", "mode", "disabled", "disabled"),
        ("WANDB_DISABLED", "false", "mode", "offline", "offline"),
    ],
)
def test_variables_of_wandb_are_honoured(
    variable: str,
    value: str,
    argument: str,
    alone: Any,
    in_study: Any,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    config = tiny("tracker=wandb", "tracker.tags=[first]")
    folder = RunFolder(tmp_path)
    assert init_arguments(config, folder, Label())[argument] == alone
    assert init_arguments(config, folder, TRIAL)[argument] == in_study


def test_online_without_a_key_is_offline_with_one_line(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("NETRC", os.devnull)
    wandb_arguments._warn_without_key.cache_clear()
    config = tiny("tracker=wandb", "tracker.mode=online")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            arguments = init_arguments(config, RunFolder(tmp_path), Label())
            assert arguments["mode"] == "offline"
    (line,) = [record.message for record in caplog.records]
    assert "WANDB_API_KEY" in line
