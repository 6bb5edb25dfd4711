"""A study whose trials have different bases."""

import json
import math
import shutil
from pathlib import Path

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.study_folder import folder_of, result_of, trials_of


@pytest.fixture(scope="module")
def other_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, with the names of two of its tokens exchanged."""
    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(tiny_base, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return folder


def bases(*folders: Path) -> list[str]:
    choices = ",".join(map(str, folders))
    no_baseline = "hydra.sweeper.baseline=false"
    return [
        no_baseline,
        "~search",
        f"model.name_or_path=choice({choices})",
        "lora.r=choice(4,8)",
    ]


def test_trials_of_each_base_train_together_and_are_compared_by_bytes(
    station: Station, tiny_base: Path, other_base: Path, tmp_path: Path
) -> None:
    ended = station.run(
        *study_overrides(tiny_base, "s"),
        *bases(tiny_base, other_base),
        "objective=eval/bits_per_byte",
        "hydra.sweeper.slots=2",
        "hydra.sweeper.baseline_seeds=0",
        "hydra/sweeper/sampler=grid",
        "hydra/sweeper/pruner=none",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    trials = trials_of(tmp_path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    results = [result_of(tmp_path, trial.number) for trial in trials]
    assert {result["engine"] for result in results} == {"packed"}
    assert any(result["companions"] for result in results)
    values = {}
    for trial in trials:
        key = (trial.params["model.name_or_path"], trial.params["lora.r"])
        values[key] = trial.value
    assert len(set(values.values())) == 4
    # Each as alone.
    study = study_overrides(tiny_base, "s")[3:]
    for base in (tiny_base, other_base):
        alone = station.run(
            *study,
            f"model.name_or_path={base}",
            "lora.r=8",
            "objective=eval/bits_per_byte",
            f"hydra.run.dir={base.parent.name}",
            cwd=tmp_path,
        )
        assert alone.returncode == 0, alone.stderr
        result = json.loads((tmp_path / base.parent.name / "result.json").read_text())
        value = result["metrics"]["eval/bits_per_byte"]
        assert values[str(base), 8] == pytest.approx(value, abs=1e-5)
        # By the loss of the same rows: less than 8 bits for most tokens of several bytes.
        assert 0 < value < result["metrics"]["eval/loss"] / math.log(2)


def test_a_loss_by_token_compares_no_bases_of_different_tokens(
    station: Station, tiny_base: Path, other_base: Path, tmp_path: Path
) -> None:
    refused = station.run(
        *study_overrides(tiny_base, "s"), *bases(tiny_base, other_base), cwd=tmp_path
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        f"error: objective=eval/loss: is per token, and {tiny_base} and {other_base} have "
        "different tokens; objective=eval/bits_per_byte compares them"
    )
    assert not (folder_of(tmp_path) / "study.json").exists()
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    allowed = station.run(
        *study_overrides(tiny_base, "t"),
        *bases(tiny_base, copy),
        "n_trials=1",
        cwd=tmp_path,
    )
    assert allowed.returncode == 0, allowed.stderr
