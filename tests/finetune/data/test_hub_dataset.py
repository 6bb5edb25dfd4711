"""Data sets on the hub: which revision is read, and which commit it is."""

from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset, DatasetDict
from support.bad_input import matches
from support.models import Row
from support.rows import Settings, texts

from finetune.data.sources import Source, open_source
from finetune.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network, with a data set in the cache as `load_dataset` leaves it.

    Returns:
        The folder of the hub's cache, in which tags are resolved.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    write_cached(
        tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / COMMIT, texts(3)
    )
    return tmp_path / "hub"


def write_cached(folder: Path, rows: list[Row]) -> None:
    saved = folder.parents[3] / "saved"
    dataset = Dataset.from_list(rows)
    DatasetDict({"train": dataset}).save_to_disk(str(saved))
    folder.mkdir(parents=True)
    (saved / "train" / "data-00000-of-00001.arrow").rename(folder / "name-train.arrow")
    info = datasets.DatasetInfo(
        features=dataset.features,
        builder_name="json",
        dataset_name="name",
        config_name="default",
        version="0.0.0",
        splits={"train": {"name": "train", "num_bytes": 1, "num_examples": 3}},
    )
    info.write_to_directory(str(folder))


def open_hub(settings: Settings, **changes: object) -> Source:
    return open_source(
        "dataset.path", "owner/name", settings(path="owner/name", **changes)
    )


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("revision", [None, COMMIT, COMMIT[:8]])
def test_the_commit_of_a_cached_data_set_is_known(
    settings: Settings, revision: str | None
) -> None:
    source = open_hub(settings, revision=revision)
    assert list(source.rows) == texts(3)
    assert source.commit == COMMIT


def test_a_tag_is_resolved_by_the_cache_of_the_hub(
    settings: Settings, hub_cache: Path
) -> None:
    references = hub_cache / "datasets--owner--name" / "refs"
    references.mkdir(parents=True)
    (references / "v1").write_text(COMMIT)
    (references / "v2").write_text("f" * 40)
    assert open_hub(settings, revision="v1").commit == COMMIT
    with pytest.raises(ConfigError, match=r"^dataset.revision=v2: "):
        open_hub(settings, revision="v2")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("revision", ["f" * 40, "main"])
def test_a_cached_data_set_of_another_revision_is_refused(
    settings: Settings, revision: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        open_hub(settings, revision=revision)
    expected = (
        f"dataset.revision={revision}: the hub can't be reached, and the cache holds commit "
        f"{COMMIT} of owner/name"
    )
    assert str(refused.value) == expected


@pytest.mark.usefixtures("hub_cache")
def test_an_unknown_split_is_refused_in_one_line(settings: Settings) -> None:
    with pytest.raises(ConfigError) as refused:
        open_hub(settings, split="none")
    assert matches("dataset.path=owner/name: …", str(refused.value))
    assert "\n" not in str(refused.value)


def test_a_file_has_no_commit(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("one\n")
    assert open_source("dataset.path", str(file), settings()).commit is None
