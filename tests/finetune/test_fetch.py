"""python -m finetune.fetch: afterwards a run needs no network."""

import json
import shutil
from pathlib import Path

import pytest
from support.bad_input import Workplace, matches
from support.commands import Station
from support.hub_files import COMMIT, serve_hub

ROWS = "".join(
    json.dumps({"prompt": f"Say {number}.", "completion": f"{number}"}) + "\n"
    for number in range(40)
)
RUN = [
    "dataset.path=rows.jsonl",
    "model.name_or_path=owner/tiny",
    "trainer=debug",
    "tracker=none",
    "sample_prompts=[]",
]


@pytest.fixture
def repository(tiny_base: Path, tmp_path: Path) -> Path:
    """A base as people publish it: with the same weights in other formats beside."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_base, folder)
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/a.safetensors",
    ):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"other")
    return folder


@pytest.mark.slow
def test_a_run_needs_no_network_afterwards(
    light_station: Station, repository: Path, tmp_path: Path
) -> None:
    home = tmp_path / "work"
    home.mkdir()
    (home / "rows.jsonl").write_text(ROWS)
    cache = {"HF_HOME": str(tmp_path / "hub")}
    with serve_hub({"owner/tiny": repository}) as hub:
        online = {**cache, "HF_ENDPOINT": hub.address}
        fetched = light_station.run(
            *RUN, "--json", cwd=home, module="finetune.fetch", environment=online
        )
        assert fetched.returncode == 0, fetched.stderr
        first = list(hub.downloads)
        again = light_station.run(
            *RUN, cwd=home, module="finetune.fetch", environment=online
        )

    data, base = json.loads(fetched.stdout)
    assert data["name"] == "rows.jsonl"
    assert base["commit"] == COMMIT
    assert (Path(base["folder"]) / "model.safetensors").is_file()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(first)
    others = {"pytorch_model.bin", "consolidated.safetensors", "original/a.safetensors"}
    assert not others & set(first)
    assert hub.downloads == first
    assert f"base  owner/tiny at {COMMIT[:12]}: " in again.stdout
    assert not (home / "outputs").exists()

    # Each later start, and from the cache alone.
    offline = {**cache, "HF_HUB_OFFLINE": "1"}
    trained = light_station.run(*RUN, cwd=home, environment=offline)
    assert trained.returncode == 0, trained.stderr
    result = next(home.rglob("result.json"))
    assert json.loads(result.read_text())["base_model"]["revision"] == COMMIT


def test_a_sweep_has_each_base_among_its_values(
    light_station: Station, repository: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    words = ["dataset.path=rows.jsonl", "hydra/sweeper=optuna", "lora.r=4,8"]
    bases = "model.name_or_path=owner/tiny,owner/other"
    with serve_hub({"owner/tiny": repository, "owner/other": other}) as hub:
        online = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": hub.address}
        fetched = light_station.run(
            "-m",
            *words,
            bases,
            cwd=tmp_path,
            module="finetune.fetch",
            environment=online,
        )

    assert fetched.returncode == 0, fetched.stderr
    kinds = [line.split()[:2] for line in fetched.stdout.splitlines()]
    assert kinds == [
        ["data", "rows.jsonl:"],
        ["base", "owner/tiny"],
        ["base", "owner/other"],
    ]


@pytest.mark.parametrize("state", ["missing", "without-weights", "one-shard"])
def test_what_is_not_whole_is_refused(
    workplace: Workplace, repository: Path, state: str
) -> None:
    workplace.write({"rows.jsonl": ROWS})
    says = {
        "missing": "the hub has no such repository (a private one needs HF_TOKEN)",
        "without-weights": "has no *.safetensors weights (pickled ones are not loaded)",
        "one-shard": "model-2.safetensors is missing, which its index names",
    }[state]
    folders = {} if state == "missing" else {"owner/tiny": repository}
    if state == "without-weights":
        (repository / "model.safetensors").unlink()
    if state == "one-shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with serve_hub(folders) as hub:
        outcome = workplace.call(*RUN, module="finetune.fetch", HF_ENDPOINT=hub.address)

    assert matches(f"model.name_or_path=owner/tiny: {says}", outcome.error), (
        outcome.error
    )
    assert not outcome.torch_imported


@pytest.mark.slow
def test_a_base_that_a_run_has_downloaded_is_found_without_a_network(
    light_station: Station, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    cache = {"HF_HOME": str(tmp_path / "hub")}
    with serve_hub({"owner/tiny": repository}) as hub:
        online = {**cache, "HF_ENDPOINT": hub.address}
        trained = light_station.run(*RUN, cwd=tmp_path, environment=online)
    assert trained.returncode == 0, trained.stderr
    assert "HTTP" not in trained.stderr

    offline = {**cache, "HF_HUB_OFFLINE": "1"}
    again = light_station.run(
        *RUN, cwd=tmp_path, module="finetune.fetch", environment=offline
    )
    assert again.returncode == 0, again.stderr
    assert "using what is cached" in again.stderr
