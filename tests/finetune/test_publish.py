"""A run on the hub: what arrives there over HTTP, what never does, and how a failure ends."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.commands import Station
from support.configs import compose, tiny_overrides
from support.hub_server import TOKEN, HubServer, Repository, hub_server
from support.runs import write_jsonl

from finetune.files.run_folder import RunFolder
from finetune.metrics.metric import Score
from finetune.run.load import read_run_config
from finetune.run.run import run
from finetune.sharing.base_license import CardBase
from finetune.sharing.card_metrics import score_interval
from finetune.sharing.model_card import make_model_card
from finetune.sharing.usage import Usage, card_usage

SECRET = "quetzal"
"""In every row, prompt, answer, template and folder."""

Publish = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with secret rows, prompts, template and path."""
    place = tmp_path_factory.mktemp(SECRET)
    base = Path(shutil.copytree(tiny_base, place / "own-base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
    (base / "LICENSE").write_text("The licence's text.\n")
    rows = [{"title": f"{SECRET} {n}", "reply": f"{SECRET}!"} for n in range(300)]
    data = write_jsonl(place / "mine.jsonl", rows)
    overrides = [
        f"model.name_or_path={base}",
        f"dataset.path={data}",
        f"dataset.template='Is {{{{title}}}} a {SECRET}?'",
        "+dataset.columns.completion=reply",
        f"sample_prompts=['Tell me of a {SECRET}.']",
        "sample_max_new_tokens=4",
        "evaluation.max_new_tokens=4",
        "dataset.limit=null",
        "dataset.eval_fraction=0.1",
        "dataset.test_fraction=0.2",
        "quantization=none",
        "dataset.max_length=64",
        "trainer.max_steps=2",
        "hub.push=false",
        "name=tiny",
    ]
    config = compose(*tiny_overrides(tiny_base), *overrides, "evaluation=exact_match")
    run(config, place / "run")
    return place / "run"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose files may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def publish(light_station: Station, hub: HubServer, tmp_path: Path) -> Publish:
    """Runs the command as a user does, against the stub."""

    def command(*arguments: str, **environment: str) -> CompletedProcess[str]:
        variables = {**hub.environment, "HF_HOME": str(tmp_path / "hf"), **environment}
        return light_station.run(
            *arguments, cwd=tmp_path, module="finetune.publish", environment=variables
        )

    return command


def test_adapter_tokenizer_licence_and_card_arrive_in_one_commit(
    trained: Path, hub: HubServer, publish: Publish
) -> None:
    ended = publish(str(trained), "--to", "me/tiny", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    printed = json.loads(ended.stdout)
    repository = hub.repositories["me/tiny"]
    assert printed == {
        "repository": "me/tiny",
        "url": f"{hub.address}/me/tiny",
        "commit": repository.branches["main"],
        "changed": True,
        "samples": False,
    }
    assert repository.private
    assert len(repository.commits) == 2
    arrived = repository.files()
    card = ModelCard(arrived.pop("README.md").decode())
    assert arrived.pop("LICENSE") == b"The licence's text.\n"
    adapter = {
        file.name: file.read_bytes()
        for file in (trained / "adapter").iterdir()
        if file.name != "README.md"
    }
    assert arrived == adapter
    assert "tokenizer.json" in adapter

    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a folder is none to the hub
    result = json.loads((trained / "result.json").read_text())
    metrics = result["metrics"]
    shown = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert shown == {name: metrics[name] for name in metrics if name.startswith("test")}
    assert f"`{result['dataset_fingerprint']}`" in card.text
    assert re.search(r"\| test/loss \| \d+ \| [\d.]+ \| [\d.]+ to [\d.]+ \|", card.text)
    assert re.search(r"\| eval/loss \| \d+ \| [\d.]+ \| none \|", card.text)
    assert "| `lora.r` | 16 |" in card.text
    assert "own-base" in card.text
    assert "mine.jsonl" in card.text


def test_rows_prompts_templates_errors_paths_and_token_stay_at_home(
    folder: Path, hub: HubServer, publish: Publish
) -> None:
    result = json.loads((folder / "result.json").read_text())
    result["error"] = f"row 3: {SECRET}"
    (folder / "result.json").write_text(json.dumps(result))
    record = json.loads((folder / "run.json").read_text())
    record["config"]["trainer"]["extra"] = {"run_name": f"of a {SECRET}"}
    record["config"]["lora"]["adapter"] = f"/home/{SECRET}/earlier"
    (folder / "run.json").write_text(json.dumps(record))
    ended = publish(str(folder), "--to", "me/tiny")
    assert ended.returncode == 0, ended.stderr
    card = hub.repositories["me/tiny"].files()["README.md"].decode()
    assert SECRET not in card
    assert "| `lora.adapter` | earlier |" in card
    assert "/" not in re.sub(r"https?://\S+|me/tiny|(test|eval)/\w+|`\w+/`", "", card)
    assert TOKEN not in card + ended.stdout + ended.stderr
    assert hub.repositories["me/tiny"].messages == ["initial commit", "Adapter of tiny"]


def test_the_licence_of_a_base_from_the_hub_comes_with_the_adapter(
    folder: Path, hub: HubServer, publish: Publish
) -> None:
    base = Repository(private=False)
    fields = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\n"
    files = {"README.md": f"---\n{fields}---\n".encode(), "LICENSE": b"Terms."}
    commit = base.commit("main", files, "base")
    hub.repositories["org/base"] = base
    record = json.loads((folder / "run.json").read_text())
    record["config"]["model"]["name_or_path"] = "org/base"
    (folder / "run.json").write_text(json.dumps(record))
    result = json.loads((folder / "result.json").read_text())
    result["base_model"] = {"name": "org/base", "revision": commit, "sha256": None}
    (folder / "result.json").write_text(json.dumps(result))

    assert publish(str(folder), "--to", "me/tiny").returncode == 0
    arrived = hub.repositories["me/tiny"].files()
    assert arrived["LICENSE"] == b"Terms."
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert (card.data.license, card.data.license_name) == ("other", "llama3")
    assert f'revision="{commit}"' in card.text
    assert f"vllm serve org/base --revision {commit} --enable-lora" in card.text

    # Out of reach meanwhile: the card says so, and the adapter is published.
    del hub.repositories["org/base"]
    ended = publish(str(folder), "--to", "me/again")
    assert ended.returncode == 0
    assert "org/base: its licence is not known" in ended.stderr
    card = ModelCard(hub.repositories["me/again"].files()["README.md"].decode())
    assert card.data.license is None
    assert "licence is not known" in card.text


def test_samples_stand_in_the_card_where_they_are_wanted(
    trained: Path, hub: HubServer, publish: Publish
) -> None:
    assert publish(str(trained), "--to", "me/tiny", "--samples").returncode == 0
    card = hub.repositories["me/tiny"].files()["README.md"].decode()
    assert f"Tell me of a {SECRET}." in card
    assert "mine.jsonl" in card
    assert card.count(SECRET) == 1 + sum(
        sample[when].count(SECRET)
        for sample in json.loads((trained / "samples.json").read_text())
        for when in ("before", "after")
    )


def test_the_cards_python_loads_what_was_published(
    trained: Path,
    hub: HubServer,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert publish(str(trained), "--to", "me/tiny").returncode == 0
    files = hub.repositories["me/tiny"].files()
    here = tmp_path / "me" / "tiny"
    here.mkdir(parents=True)
    for name, content in files.items():
        (here / name).write_bytes(content)
    (tmp_path / "own-base").symlink_to(trained.parent / "own-base")
    monkeypatch.chdir(tmp_path)
    code = python_of(files["README.md"].decode())
    names: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=128", "max_new_tokens=2"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert capsys.readouterr().out


def python_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def run_cards_python(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Execute the code of a run's card where its repository is a folder; return its names."""
    text = make_model_card(RunFolder(folder), "me/ad", samples=False).text
    (place / "me").mkdir()
    shutil.copytree(folder / "adapter", place / "me" / "ad")
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(python_of(text).replace("max_new_tokens=128", "max_new_tokens=20"), names)
    return names


def test_the_cards_python_stops_at_the_ends_that_were_learnt(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own-base").symlink_to(trained.parent / "own-base")
    every_token = list(range(600))
    ends = folder / "adapter" / "generation_config.json"
    change(ends, "eos_token_id", value=every_token)

    names = run_cards_python(folder, tmp_path, monkeypatch)

    prompt = names["inputs"]["input_ids"].shape[1]
    assert names["answer"].shape[1] == prompt + 1


def test_the_cards_python_asks_a_base_without_a_template(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own-base").symlink_to(trained.parent / "own-base")
    (folder / "adapter" / "chat_template.jinja").unlink()

    names = run_cards_python(folder, tmp_path, monkeypatch)

    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_cards_python_names_a_base_of_any_name(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / 'a "base" \\ of {{ mine }}'
    base.symlink_to(trained.parent / "own-base")
    change(folder / "run.json", "config", "model", "name_or_path", value=str(base))

    names = run_cards_python(folder, tmp_path, monkeypatch)

    assert names["base"].name_or_path == base.name


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ('{"status": "interrupted"}', "has not completed: interrupted."),
        (None, "has not completed: it has written no result yet."),
    ],
)
def test_the_card_of_a_run_that_has_not_completed_says_so(
    folder: Path, result: str | None, said: str
) -> None:
    (folder / "result.json").unlink()
    if result is not None:
        (folder / "result.json").write_text(result)
    assert said in make_model_card(RunFolder(folder), "me/ad", samples=False).text


def test_published_again_only_what_changed_is_a_new_commit(
    folder: Path, hub: HubServer, publish: Publish
) -> None:
    (folder / "adapter" / "added_tokens.json").write_text("{}")
    for _ in range(2):
        ended = publish(str(folder), "--to", "me/tiny")
        assert ended.returncode == 0, ended.stderr
    repository = hub.repositories["me/tiny"]
    assert len(repository.messages) == 2
    assert ended.stdout.endswith("has the same files already\n")

    repository.commits[repository.branches["main"]]["notes.md"] = b"the user's"
    (folder / "adapter" / "added_tokens.json").unlink()
    assert publish(str(folder), "--to", "me/tiny").returncode == 0
    assert len(repository.messages) == 3
    assert "added_tokens.json" not in repository.files()
    assert repository.files()["notes.md"] == b"the user's"


def test_a_run_from_before_newer_files_and_keys_is_published(
    folder: Path, hub: HubServer, publish: Publish
) -> None:
    record = json.loads((folder / "run.json").read_text())
    del record["config"]["evaluation"]
    del record["config"]["hub"]["samples"]
    del record["config"]["tracker"]["text"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text('{"status": "completed"}')
    (folder / "test_rows.json").unlink()
    (folder / "samples.json").unlink()
    ended = publish(str(folder), "--samples", "--no-private")
    assert ended.returncode == 0, ended.stderr
    assert not hub.repositories[
        "me/tiny"
    ].private  # the run's name, and the token's owner
    assert (
        "None are recorded."
        in hub.repositories["me/tiny"].files()["README.md"].decode()
    )


REFUSALS = {
    "no token": ({"HF_TOKEN": ""}, {}, "there is no token"),
    "another's token": ({"HF_TOKEN": "hf_other"}, {}, "does not accept the token"),
    "no possible token": (
        {"HF_TOKEN": "hf_\u00fc"},
        {},
        "characters that no token has",
    ),
    "offline": ({"HF_HUB_OFFLINE": "1"}, {}, "HF_HUB_OFFLINE is set"),
    "out of reach": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "can't be reached"),
    "not creatable": ({}, {"POST /api/repos": 403}, "may not write there (HTTP 403)"),
    "not writable": (
        {},
        {"POST /api/models/me/tiny/commit": 403},
        "may not write there",
    ),
    "storage": ({}, {"PUT /lfs": 400}, "(HTTP 400)"),
    "commit": ({}, {"POST /api/models/me/tiny/commit": 500}, "has failed"),
    "conflict": ({}, {"POST /api/models/me/tiny/commit": 412}, "came in between"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_failure_is_one_line_and_changes_no_file(
    case: str, trained: Path, hub: HubServer, publish: Publish
) -> None:
    environment, fails, said = REFUSALS[case]
    hub.fails = fails
    ended = publish(str(trained), "--to", "me/tiny", "--json", **environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: --to=me/tiny: ")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    assert TOKEN not in ended.stderr
    for repository in hub.repositories.values():
        assert repository.files() == {}


@pytest.mark.parametrize("name", ["me/a/b", "me/no spaces", "-x", "others/tiny", ""])
def test_names_that_can_not_be_are_refused(
    name: str, trained: Path, publish: Publish
) -> None:
    ended = publish(str(trained), f"--to={name}")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: --to={name}: ")


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(
    trained: Path, hub: HubServer, publish: Publish
) -> None:
    def commit_first(request: str) -> None:
        if request.startswith("PUT /lfs"):
            hub.repositories["me/tiny"].commit("main", {"a": b"theirs"}, "theirs")

    hub.on_request = commit_first
    ended = publish(str(trained), "--to", "me/tiny")
    assert "another commit came in between" in ended.stderr
    assert hub.repositories["me/tiny"].files() == {"a": b"theirs"}


def test_a_run_with_hub_push_is_published_with_its_final_metrics(
    trained: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    from finetune.run.load import read_run_config
    from finetune.sharing.publication import push_if_wanted

    assert not read_run_config(trained).hub.push
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    record["config"]["hub"] |= {"push": True, "model_id": "me/pushed"}
    (folder / "run.json").write_text(json.dumps(record))
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert push_if_wanted(trained) is None
    said = push_if_wanted(folder)
    assert said is not None
    assert said.startswith(f"published: {hub.address}/me/pushed")
    assert (
        "test/exact_match"
        in hub.repositories["me/pushed"].files()["README.md"].decode()
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
@pytest.mark.parametrize("rows", [30, 100])
def test_intervals_of_shares_hold_the_truth(share: float, rows: int) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        right = (generator.random(rows) < share).astype(float)
        score = Score(right.mean(), True, tuple(right), (1,) * rows)
        interval = score_interval(score)
        assert interval is not None
        held += interval[0] <= share <= interval[1]
    assert held >= 0.94 * 400


def change(file: Path, *keys: str, value: Any) -> None:
    """Change a value in a JSON file."""
    content = json.loads(file.read_text())
    level = content
    for key in keys[:-1]:
        level = level[key]
    level[keys[-1]] = value
    file.write_text(json.dumps(content))


def usage(folder: Path) -> Usage:
    run = RunFolder(folder)
    base = CardBase("org/base", is_on_hub=True, revision="c0ffee")
    return card_usage(run, read_run_config(folder), base, "me/ad")


@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        ("lora.r", 12, "--max-lora-rank 16"),
        ("model.trust_remote_code", True, "--trust-remote-code"),
        ("model.chat_template", "{{ 1 }}", "--chat-template chat_template.jinja"),
        (
            "model.template_kwargs",
            {"enable_thinking": False, "greeting": f"Dear {SECRET} of ACME"},
            "--default-chat-template-kwargs '{\"enable_thinking\": false}'",
        ),
    ],
)
def test_the_cards_command_serves_the_adapter_as_it_was_trained(
    folder: Path, key: str, value: Any, flags: str
) -> None:
    change(folder / "run.json", "config", *key.split("."), value=value)
    command = usage(folder).vllm
    assert command is not None
    assert command.startswith("vllm serve org/base --revision c0ffee ")
    assert " --enable-lora --lora-modules ad=me/ad --max-lora-rank " in command
    assert " --generation-config me/ad" in command
    assert flags in command


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_dora", True, "DoRA"),
        ("init_lora_weights", "pissa", "init_lora_weights=pissa"),
        ("rank_pattern", {"q_proj": 4}, "ranks of single layers"),
        ("bias", "all", "biases"),
    ],
)
def test_the_card_says_what_vllm_does_not_serve(
    folder: Path, key: str, value: Any, reason: str
) -> None:
    change(folder / "adapter" / "adapter_config.json", key, value=value)
    text = make_model_card(RunFolder(folder), "me/ad", samples=False).text
    assert "vllm serve" not in text
    assert f"vLLM does not serve it without merging, because it has {reason}." in text


def test_the_cards_python_asks_and_computes_as_the_run_did(folder: Path) -> None:
    kwargs = {"enable_thinking": False, "greeting": f"Dear {SECRET} of ACME"}
    record = folder / "run.json"
    change(record, "config", "model", "template_kwargs", value=kwargs)
    change(record, "config", "model", "trust_remote_code", value=True)
    change(record, "config", "quantization", "load_in_4bit", value=True)
    change(record, "config", "quantization", "bnb_4bit_compute_dtype", value="float16")
    text = make_model_card(RunFolder(folder), "me/ad", samples=False).text
    assert "    enable_thinking=False,\n" in text
    assert "rendered with greeting as well" in text
    assert SECRET not in text
    assert "    trust_remote_code=True,\n" in text
    assert "bnb_4bit_compute_dtype=torch.float16" in text


def test_an_adapter_with_published_names_is_loaded_into_the_published_model(
    folder: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    assert usage(folder).auto_class == "AutoModelForCausalLM"
    weights = {
        name.replace("model.layers", "model.language_model.layers"): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file)
    text = make_model_card(RunFolder(folder), "me/ad", samples=False).text
    assert "import AutoModelForImageTextToText, AutoTokenizer" in text
    assert "base = AutoModelForImageTextToText.from_pretrained(" in text
