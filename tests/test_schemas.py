"""The JSON Schemas in docs/schemas describe the files that runs and studies write.

Besides these tests, every test that has written such files in its `tmp_path` checks them at its end:
`tests/conftest.py`. So failed, pruned and interrupted runs, TRL's, classifications, and studies of
several objectives are checked where they are tested.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.commands import Station
from support.configs import study_overrides
from support.schemas import NAMES, SCHEMAS, check_file, check_written, validator

import finetune
import sweeps
from finetune.version import SCHEMA_VERSION


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a study with a failed trial, that was confirmed."""
    place = tmp_path_factory.mktemp("described")
    more = (
        "~search",
        "optimizer.learning_rate=choice(1e-3,2e-3,1e30)",
        "hydra.sweeper.start=[{optimizer.learning_rate: 1e30}]",
        "hydra.sweeper.confirm=2",
        "n_trials=3",
        "trainer.max_steps=8",
    )
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return place / "outputs" / "sweeps" / "s"


def test_a_study_writes_what_the_schemas_say(done: Path) -> None:
    check_written(done)
    states = set()
    for path in done.glob("trials/*/result.json"):
        check_file(path)
        states.add(json.loads(path.read_text())["status"])
    assert "failed" in states
    for name in ("answer", "confirm"):
        check_file(done / f"{name}.json")
    answer = json.loads((done / "answer.json").read_text())
    assert answer["schema_version"] == SCHEMA_VERSION
    assert answer["test"]["config"]["seeds_of"] == "both"


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_that_no_schema_has_is_noticed(name: str, done: Path) -> None:
    path = done / "best" / "result.json" if name == "result" else done / f"{name}.json"
    content = json.loads(path.read_text())
    validator(name).validate(content)
    for changed in (content | {"new": 1}, content | {"schema_version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate(changed)


def test_every_entry_is_described() -> None:
    def entries(schema: dict[str, Any]) -> list[dict[str, Any]]:
        below = schema.get("properties", {}).values()
        return [schema, *(entry for one in below for entry in entries(one))]

    for name in NAMES:
        schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
        for entry in entries(schema):
            has_names = "properties" in entry
            assert not has_names or entry["additionalProperties"] is False
    assert {path.name for path in SCHEMAS.iterdir()} == {
        f"{name}.schema.json" for name in NAMES
    }


def test_files_from_before_there_was_a_version_are_read(
    done: Path, station: Station, tmp_path: Path
) -> None:
    folder = shutil.copytree(done, tmp_path / "outputs" / "sweeps" / "s")
    for name in NAMES:
        for path in folder.rglob(f"{name}.json"):
            content = json.loads(path.read_text())
            del content["schema_version"]
            path.write_text(json.dumps(content))

    study = sweeps.load_study(folder)
    assert study.answer is not None
    assert study.best.status == finetune.load(folder / "best").status == "completed"
    assert study.report().exists()
    for words in ("show s 0 --json", "diff s 0 2", "best s", "confirm s --seeds 2"):
        ended = station.run(*words.split(), cwd=tmp_path, module="sweeps")
        assert ended.returncode == 0, ended.stderr
    check_file(folder / "answer.json")
    check_file(folder / "confirm.json")
