"""A study's winner handed on: its card on the hub, the gate of a promotion, and three registries."""

import contextlib
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.evaluations import evaluation
from support.hub_server import HubServer, hub_server
from support.runs import write_jsonl
from support.wandb_runs import connected

from finetune.errors import ConfigError
from finetune.model.adapter_files import weights_digest
from finetune.model.packaged import SMOLLM2
from finetune.sharing.publication import find_target
from finetune.tracking.mlflow_registry import MlflowRegistry
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.registry import DIGEST, require_alias
from finetune.tracking.wandb_registry import WandbRegistry
from sweeps.answer.compare import compare_adapters
from sweeps.answer.gate import Deployed, Gate, pass_gate, require_same_base
from sweeps.answer.promotion import Request, check_request, promote
from sweeps.answer.publish_hub import best_folder, publish_winner, why_no_answer
from sweeps.study.study import Study

SECRET = "quetzal"

Promote = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with a study of two trials, the second far better, and 60 rows for a test."""
    place = tmp_path_factory.mktemp("promoted")
    rows = [{"prompt": f"{SECRET} {n}?", "completion": f"{n}"} for n in range(240)]
    data = write_jsonl(place / "rows.jsonl", rows)
    write_jsonl(place / "test.jsonl", rows[:60])
    ended = station.run(
        *study_overrides(tiny_base, "s1"),
        f"dataset.path={data}",
        "dataset.limit=null",
        "dataset.eval_fraction=0.1",
        "dataset.test_fraction=0.2",
        "~search",
        "optimizer.learning_rate=tag(log,interval(1e-5,1e-1))",
        "hydra.sweeper.start=[{optimizer.learning_rate: 3e-2}]",
        "hydra.sweeper.n_trials=2",
        "hydra/sweeper/pruner=none",
        "trainer.max_steps=10",
        cwd=place,
    )
    assert ended.returncode == 0, ended.stderr
    return place


@pytest.fixture
def place(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory, which is the working directory."""
    here = Path(shutil.copytree(done, tmp_path / "place"))
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return here


@pytest.fixture
def study(place: Path) -> Study:
    return Study.load(place / "outputs" / "sweeps" / "s1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stub of the hub, which this process uses."""
    import huggingface_hub.constants as constants

    with hub_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def run_promote(station: Station, place: Path) -> Promote:
    """Runs the command as a cron job does."""

    def command(*arguments: str, **environment: str) -> CompletedProcess[str]:
        words = ["promote", "s1", "--data", "test.jsonl", "--metric", "test/loss"]
        return station.run(
            *words, *arguments, cwd=place, module="sweeps", environment=environment
        )

    return command


def asked(study: Study, against: str = "none", to: str = "hub", **more: Any) -> Request:
    gate = Gate(
        "test.jsonl", more.pop("metric", "test/loss"), more.pop("min_gain", 0.0)
    )
    return Request(
        against, gate, to, more.pop("alias", "champion"), more.pop("name", None)
    )


def test_the_winners_card_has_the_studys_trials_and_its_conclusion(
    study: Study, hub: HubServer
) -> None:
    confirmed = {
        "trial": 1,
        "role": "",
        "values": [5.0],
        "mean": 5.0,
        "spread": None,
        "failed": [f"row 3: {SECRET}"],
    }
    confirmation = {
        "before": 1,
        "winner": 1,
        "objective": "eval/loss",
        "candidates": [confirmed],
        "comparisons": [],
    }
    (study.folder / "confirm.json").write_text(json.dumps(confirmation))
    target = find_target(best_folder(study), default_name=study.name)
    assert publish_winner(study, target).repository == "me/s1"
    files = hub.repositories["me/s1"].files()
    card = ModelCard(files["README.md"].decode())
    assert "optuna" in card.data.tags
    for trial in study.trials():
        (line,) = [
            line
            for line in card.text.splitlines()
            if line.startswith(f"| {trial.number} | complete | {trial.value:.4f} |")
        ]
        assert f"{trial.params['optimizer.learning_rate']:g}" in line
    assert "this adapter is better than the baseline's" in card.text
    assert "95 % interval" in card.text
    assert (
        "trial 1: eval/loss 5.0000 with 1 other seed  1 failed: (not shown)"
        in card.text
    )
    assert SECRET not in files["README.md"].decode()
    weights = best_folder(study) / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()


def test_a_study_without_an_answer_publishes_and_promotes_nothing(
    study: Study, place: Path, run_promote: Promote, station: Station
) -> None:
    study.optuna.enqueue_trial({"optimizer.learning_rate": 1e-3})
    assert "1 of its trials have not ended" in str(why_no_answer(study))
    ended = run_promote("--against", "none", "--to", "mlflow", "--json")
    published = station.run("publish", "s1", cwd=place, module="sweeps")
    for command in (ended, published):
        assert (command.returncode, command.stdout) == (4, "")
        assert command.stderr.startswith("error: s1: 1 of its trials have not ended")
        assert "python -m sweeps work outputs/sweeps/s1 trains them" in command.stderr
        assert command.stderr.count("\n") == 1


def test_weeks_of_a_cron_job_with_mlflow(
    study: Study, place: Path, run_promote: Promote
) -> None:
    first = run_promote("--against", "none", "--to", "mlflow", "--name", "units")
    assert first.returncode == 0, first.stderr
    assert "units, version 1 is champion" in first.stdout
    again = run_promote("--against", "none", "--to", "mlflow", "--name", "units")
    assert again.returncode == 0
    assert "champion is this adapter already: units, version 1" in again.stdout

    # The next week: the winner is the deployed one, and the registry has another.
    baseline = str(study.folder / "trials" / "0")
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    registry = MlflowRegistry("--name", "units", None)
    lineage = {"study": "s0", "config": {}, DIGEST: "0"}
    registry.register(Path(baseline, "adapter"), lineage, "champion")
    lost = run_promote("--against", "none", "--to", "mlflow", "--name", "units")
    assert lost.returncode == 1
    assert "--against=none: champion is an adapter already" in lost.stderr

    better = run_promote(
        "--against", baseline, "--to", "mlflow", "--name", "units", "--json"
    )
    assert better.returncode == 0, better.stderr
    printed = json.loads(better.stdout)
    low, high = printed["interval_95"]
    assert 0 < low < printed["gain"] < high
    assert printed["gain"] == pytest.approx(printed["deployed"] - printed["winner"])
    assert (printed["rows"], printed["promoted"]) == (60, True)
    # The same weights: the first week's version, no third one.
    assert printed["registered"]["version"] == "1"
    assert printed["registered"]["url"] is None
    assert printed["registered"]["command"] == (
        "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )
    assert len(store.search_model_versions("name = 'units'")) == 2
    assert store.get_model_version_by_alias("units", "champion").version == 1


KILLED_AFTER = """
import os, signal
import mlflow
from finetune.tracking import mlflow_registry
owner = {"_create_run": mlflow_registry.MlflowRegistry}.get("NAME", mlflow.MlflowClient)
plain = getattr(owner, "NAME")
def killed(*arguments, **more):
    plain(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, "NAME", killed)
"""


@pytest.mark.parametrize(
    "step", ["_create_run", "create_model_version", "set_registered_model_alias"]
)
def test_a_killed_promotion_is_completed_by_the_next(
    step: str, study: Study, place: Path, station: Station
) -> None:
    words = ["promote", "s1", "--against", "none", "--data", "test.jsonl"]
    words += ["--metric", "test/loss", "--to", "mlflow"]
    before = KILLED_AFTER.replace("NAME", step)
    killed = station.start(*words, cwd=place, module="sweeps", before=before).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = station.run(*words, cwd=place, module="sweeps")
    assert again.returncode == 0, again.stderr
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    [version] = store.search_model_versions("name = 'finetune'")
    marked = store.get_model_version_by_alias("finetune", "champion")
    assert marked.version == version.version


def test_two_promotions_at_once_register_one_version(
    study: Study, place: Path, station: Station
) -> None:
    words = ["promote", "s1", "--data", "test.jsonl", "--metric", "test/loss"]
    words += ["--against", str(study.folder / "trials" / "0"), "--to", "mlflow"]
    both = [station.start(*words, cwd=place, module="sweeps") for _ in range(2)]
    ended = [command.wait() for command in both]
    assert [command.returncode for command in ended] == [0, 0], ended
    printed = sorted(command.stdout for command in ended)
    assert "champion is this adapter already" in printed[0] + printed[1]
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    assert len(store.search_model_versions("name = 'finetune'")) == 1


def test_an_alias_that_moves_during_the_comparison_stays(
    study: Study,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    baseline = study.folder / "trials" / "0"
    registry = MlflowRegistry("--name", "finetune", None)

    def others_register(digest: str) -> None:
        lineage = {"study": "another", "config": {}, DIGEST: digest}
        registry.register(baseline / "adapter", lineage, "champion")

    def pass_gate_meanwhile(*arguments: Any) -> Any:
        verdict = pass_gate(*arguments)
        others_register("1")
        return verdict

    others_register("0")
    monkeypatch.setattr("sweeps.answer.promotion.pass_gate", pass_gate_meanwhile)
    with pytest.raises(ConfigError, match=r"since the comparison began .*version 2"):
        promote(study, asked(study, str(baseline), "mlflow"))
    assert "champion marks another adapter (finetune, version 1)" in caplog.text
    current = registry.current("champion")
    assert current is not None
    assert current.digest == "1"


def test_mlflow_holds_the_adapter_and_where_it_comes_from(
    study: Study, place: Path, tmp_path: Path
) -> None:
    baseline = study.folder / "trials" / "0"
    promotion = promote(study, asked(study, str(baseline), "mlflow"))
    assert promotion.verdict is not None
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    version = store.get_model_version_by_alias("finetune", "champion")
    adapter = best_folder(study) / "adapter"
    assert version.tags[DIGEST] == weights_digest(adapter)
    assert (version.tags["study"], version.tags["trial"]) == ("s1", "1")
    assert json.loads(version.tags["gate"])["gain"] == promotion.verdict.gain
    against = json.loads(version.tags["against"])
    assert against == {"name": "0", DIGEST: weights_digest(baseline / "adapter")}
    stored = Path(store.download_artifacts(version.run_id, "adapter", str(tmp_path)))
    assert weights_digest(stored) == weights_digest(adapter)
    params = store.get_run(version.run_id).data.params
    assert params["optimizer.learning_rate"] == "0.03"


def test_a_worse_adapter_is_refused_with_exit_code_5(
    study: Study, place: Path, run_promote: Promote
) -> None:
    # The winner against itself with the weights of the other: the roles exchanged.
    shutil.copytree(best_folder(study), place / "deployed")
    weights = "adapter/adapter_model.safetensors"
    shutil.copy(study.folder / "trials" / "0" / weights, best_folder(study) / weights)
    ended = run_promote("--against", "deployed", "--to", "mlflow", "--json")
    assert ended.returncode == 5, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["gain"] < 0
    assert (printed["promoted"], printed["registered"]) == (False, None)
    last = ended.stderr.splitlines()[-1]
    assert last == f"error: gate not met: {printed['reason']}"
    assert "the lower end must be above 0" in last
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    assert store.search_registered_models() == []


def test_the_gate_compares_the_lower_end_of_the_interval(study: Study) -> None:
    baseline = str(study.folder / "trials" / "0")
    met = promote(study, asked(study, baseline, "mlflow"))
    assert met.verdict is not None
    between = (met.verdict.interval[0] + met.verdict.gain) / 2
    strict = asked(study, baseline, "mlflow", min_gain=between, alias="strict")
    assert promote(study, strict).is_refused


def test_all_rows_are_compared_whatever_the_studys_limit(study: Study) -> None:
    """A limit of the study's own evaluations says nothing of the gate's rows."""
    path = best_folder(study) / "run.json"
    identity = json.loads(path.read_text())
    identity["config"]["evaluation"]["limit"] = 3
    identity["config"]["evaluation"]["max_new_tokens"] = 2
    path.write_text(json.dumps(identity))
    baseline = str(study.folder / "trials" / "0")
    request = asked(study, baseline, "mlflow", metric="test/exact_match", min_gain=-1.0)
    verdict = promote(study, request).verdict
    assert verdict is not None
    assert verdict.rows == 60


def test_the_hub_has_the_winner_on_the_branch_of_the_alias(
    study: Study, hub: HubServer
) -> None:
    baseline = str(study.folder / "trials" / "0" / "adapter")
    answer = json.loads((study.folder / "answer.json").read_text())
    answer["params"] |= {
        "dataset.template": f"You are {SECRET}. {{{{prompt}}}}",
        "dataset.path": f"/home/{SECRET}/rows.jsonl",
    }
    (study.folder / "answer.json").write_text(json.dumps(answer))
    assert not promote(study, asked(study, name="me/units")).is_refused
    repository = hub.repositories["me/units"]
    first = repository.files("champion")
    assert "it was compared with none" in first["README.md"].decode()
    requests = len(hub.requests)
    again = promote(study, asked(study, baseline, name="me/units"))
    assert "already" in again.reason
    assert not any("commit" in request for request in hub.requests[requests:])

    # Another week's winner has taken the branch meanwhile.
    theirs = {**first, "adapter_model.safetensors": b"theirs"}
    repository.commit("champion", theirs, "another")
    with pytest.raises(ConfigError, match="--against=none: champion is an adapter"):
        promote(study, asked(study, name="me/units"))
    promotion = promote(study, asked(study, baseline, name="me/units"))
    files = repository.files("champion")
    assert files == repository.files()
    lineage = json.loads(files["promotion.json"])
    assert promotion.verdict is not None
    assert lineage["gate"]["gain"] == promotion.verdict.gain
    assert "config" not in lineage
    assert lineage["params"] == answer["params"] | {
        "dataset.template": "(not shown)",
        "dataset.path": "rows.jsonl",
    }
    card = files["README.md"].decode()
    assert f"{promotion.verdict.gain:+.4f}" in card
    for text in (card, files["promotion.json"].decode()):
        assert SECRET not in text
        assert str(study.folder) not in text


def test_a_branch_stays_where_its_commit_fails(study: Study, hub: HubServer) -> None:
    assert not promote(study, asked(study, name="me/units")).is_refused
    repository = hub.repositories["me/units"]
    theirs = {**repository.files(), "adapter_model.safetensors": b"theirs"}
    repository.commit("champion", theirs, "another")
    baseline = str(study.folder / "trials" / "0")
    hub.fails = {"POST /api/models/me/units/commit/champion": 403}
    with pytest.raises(ConfigError, match="may not write there"):
        promote(study, asked(study, baseline, name="me/units"))
    assert repository.files("champion") == theirs


def test_wandb_has_the_winner_as_a_version_with_the_alias(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(monkeypatch) as server:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_SILENT", "true")
        baseline = str(study.folder / "trials" / "0")
        promotion = promote(study, asked(study, baseline, "wandb", name="units"))
        assert promotion.version is not None
        assert promotion.version.version == "v0"
        url, command = promotion.version.url, promotion.version.command
        assert url is not None
        assert url.endswith("/finetune/artifacts/model/units/v0")
        assert command is None
        (run,) = server.runs.values()
        artifact = run.artifacts["units"]
        assert artifact.aliases == ["champion", "latest"]
        adapter = best_folder(study) / "adapter"
        weights = artifact.files["adapter_model.safetensors"]
        assert weights == (adapter / "adapter_model.safetensors").read_bytes()
        assert artifact.metadata[DIGEST] == weights_digest(adapter)
        assert artifact.metadata["gate"]["rows"] == 60
        assert (run.group, run.job_type) == ("s1", "promote")
        again = promote(study, asked(study, baseline, "wandb", name="units"))
        assert (again.is_new, again.version.digest) == (  # type: ignore[union-attr]
            False,
            weights_digest(adapter),
        )
        assert len(server.runs) == 1
        server.behaviour = "refuse"
        with pytest.raises(ConfigError, match="--to=wandb: "):
            promote(study, asked(study, baseline, "wandb", name="units"))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WANDB_MODE": "offline"}, "W&B is offline"),
        ({"WANDB_MODE": "online", "NETRC": "/dev/null"}, "needs a key"),
    ],
)
def test_wandb_without_its_server_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        WandbRegistry("--name", "units", None, None, True)


def test_an_adapter_on_a_packaged_base_names_it_either_way(tmp_path: Path) -> None:
    for place, name in (("new/adapter", SMOLLM2.hub_id), ("old", SMOLLM2.name)):
        (tmp_path / place).mkdir(parents=True)
        values = json.dumps({"base_model_name_or_path": name})
        (tmp_path / place / "adapter_config.json").write_text(values)
    require_same_base(tmp_path / "new", Deployed("old", tmp_path / "old", "0"))


def test_mistakes_are_one_line_before_anything_is_evaluated(
    study: Study, place: Path, tiny_base: Path
) -> None:
    baseline = study.folder / "trials" / "0"
    other = Path(shutil.copytree(baseline / "adapter", place / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another"
    (other / "adapter_config.json").write_text(json.dumps(config))
    files = [
        ("nameless", '{"peft_type": "LORA"}'),
        ("ia3", '{"peft_type": "IA3"}'),
        ("list", "[]"),
        ("text", "no JSON"),
    ]
    for name, content in files:
        copy = Path(shutil.copytree(baseline / "adapter", place / name))
        (copy / "adapter_config.json").write_text(content)
    write_jsonl(place / "few.jsonl", [{"prompt": "a", "completion": "b"}] * 5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"against": "nowhere"}, "--against=nowhere: no such run"),
        ({"against": "other"}, "--against=other: its base is another, the winner's"),
        (
            {"against": "nameless"},
            "--against=nameless: its adapter_config.json names no",
        ),
        ({"against": "ia3"}, "is not that of a LoRA adapter"),
        ({"against": "list"}, "the file is damaged, it holds no JSON object"),
        ({"against": "text"}, "the file is damaged, it is no JSON"),
        (
            {"against": "s1"},
            "--against=s1: is a study; the run of its winner is outputs",
        ),
        (
            {"metric": "exact_match"},
            "--metric=exact_match: did you mean test/exact_match",
        ),
        (
            {"metric": "test/harness/hellaswag"},
            "--metric=test/harness/hellaswag: is of the benchmark's documents, not of",
        ),
        ({"metric": "test/macro_f1"}, "needs a study with evaluation=classification"),
        ({"to": "hub"}, "--name=null: give the repository"),
    ]
    for changes, said in cases:
        given = {"against": str(baseline), "to": "mlflow"} | changes
        with pytest.raises(ConfigError) as refused:
            promote(study, asked(study, **given))
        assert said in str(refused.value)
    for data, said in (("few.jsonl", "too few rows"), ("no.jsonl", "no such file")):
        request = Request(
            str(baseline), Gate(data, "test/loss", 0), "mlflow", "c", None
        )
        with pytest.raises(ConfigError, match=said):
            promote(study, request)


RESERVED = ("v1", "V1", "latest", "LATEST", "Latest", "main", "Main", "HEAD")
IMPOSSIBLE = (
    "a b",
    "",
    "a/b",
    "1st",
    "a.b",
    "champion.lock",
    "a..b",
    "a:b",
    "é",
    "a\n",
)


@pytest.mark.parametrize("alias", [*RESERVED, *IMPOSSIBLE, "a" * 65])
def test_aliases_that_some_registry_can_not_have_are_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match=r"--alias=(?s:.*)no .*in any case"):
        require_alias(alias)
    require_alias("champion")


def test_aliases_that_are_taken_pass_the_checks_of_mlflow_and_wandb() -> None:
    from mlflow.utils import validation
    from wandb.sdk.artifacts._validators import validate_aliases

    parts = ("a", "V1", "v", "1", "-", "_", ".", "latest", "Main", "/", ":", "@", "é")
    words = {"".join(parts) for parts in itertools.product(parts, repeat=2)}
    taken = []
    for alias in [*words, "champion", "a" * 64]:
        with contextlib.suppress(ConfigError):
            require_alias(alias)
            taken.append(alias)
    assert len(taken) > 20
    for alias in taken:
        validation._validate_model_alias_name(alias)
        validation._validate_model_alias_name_reserved(alias)
        validate_aliases([alias])


def any_names() -> list[str]:
    letters = "ab 1é.'\"/:\\%;`-\n"
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    return [*pairs, "it's", 'the "best"', "n" * 250, "n" * 251, "a' or name != '"]


def test_mlflow_finds_each_model_again_whose_name_is_not_refused_at_once(
    place: Path,
) -> None:
    adapter = place / "outputs/sweeps/s1/best/adapter"
    names = any_names()
    registered = []
    for name in names:
        try:
            registry = MlflowRegistry("--name", name, None)
        except ConfigError:
            continue
        registered.append(name)
        store = registry._store
        registry._create_model()
        version = store.create_model_version(
            name, source=str(adapter), tags={DIGEST: name}
        )
        assert registry._registered(name).name == version.name == name
        assert registry._registered("another") is None
    assert {"it's", 'the "best"', "a' or name != '", "n" * 250} <= set(registered)
    assert len(registered) > len(names) / 3


@pytest.mark.parametrize(
    ("name", "to"),
    [("a/b", "mlflow"), ("'\"", "mlflow"), ("n" * 129, "wandb"), ("a b", "hub")],
)
def test_names_that_can_not_be_registered_are_refused_before_the_comparison(
    name: str,
    to: str,
    study: Study,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compares(*_: Any) -> Any:
        raise AssertionError("compared")

    monkeypatch.setattr("sweeps.answer.promotion.pass_gate", compares)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    baseline = str(study.folder / "trials" / "0")
    with pytest.raises(ConfigError, match=r"^--name="):
        promote(study, asked(study, baseline, to, name=name))


def test_a_project_is_no_name_of_a_model_or_of_wandb(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLflow's experiments may be named."""
    path = best_folder(study) / "run.json"
    content = json.loads(path.read_text())
    content["config"]["tracker"]["project"] = "team/units"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    baseline = str(study.folder / "trials" / "0")
    with pytest.raises(ConfigError, match=r"^tracker.project=team/units: .*; --name"):
        promote(study, asked(study, baseline, "mlflow"))
    with pytest.raises(ConfigError, match=r"^tracker.project=team/units: W&B takes"):
        promote(study, asked(study, baseline, "wandb", name="units"))


@pytest.mark.parametrize("call", ["log_batch", "log_dict", "log_artifacts"])
def test_a_registration_that_fails_leaves_no_run_that_seems_to_train(
    call: str, study: Study, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")

    def refuses(*_: Any, **__: Any) -> Any:
        raise ValueError("no room")

    monkeypatch.setattr(store, call, refuses)
    with pytest.raises(ConfigError, match="--to=mlflow: no room"):
        promote(study, asked(study, to="mlflow"))
    experiments = [found.experiment_id for found in store.search_experiments()]
    (left,) = store.search_runs(experiments)
    assert left.info.status == "FAILED"


def test_mlflow_registers_a_config_with_any_keys(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By default MLflow cuts long values itself.
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    registry = MlflowRegistry("--name", "it's", "p" * 300)
    adapter = place / "outputs/sweeps/s1/best/adapter"
    config = {
        "lora": {"rank_pattern": {"^m.*(q|v)$": 4, "a//b": 8, "long": "v" * 9999}}
    }
    lineage = {"study": "s" * 300, "config": config, DIGEST: "0"}
    version = registry.register(adapter, lineage, "champion")
    assert registry.register(adapter, lineage, "champion") == version
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    (found,) = store.search_model_versions('name = "it\'s"')
    shown = store.get_run(found.run_id)
    assert shown.info.status == "FINISHED"
    assert len(shown.data.params) == 3


def test_an_empty_name_does_not_stand_for_the_default(place: Path) -> None:
    gate = Gate("test.jsonl", "test/loss", 0)
    with pytest.raises(ConfigError, match=r"^--name=: must be a name, or left out$"):
        check_request(Request("none", gate, "mlflow", "champion", ""))


def test_rows_that_both_answer_alike_leave_room_for_others() -> None:
    """Of 60 equal answers, the interval is no point: others may differ."""
    right = evaluation(np.zeros(60), [1] * 60, [1] * 60)
    compared = compare_adapters(right, right, "accuracy")
    assert compared.high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert compared.low == -compared.high
    assert compared.verdict == "no clear difference"


def test_luck_passes_a_gate_of_answers_seldom() -> None:
    """Two adapters that are right equally often: at most 2.5 of 100 intervals lie above 0."""
    generator = np.random.default_rng(0)
    passed = 0
    for _ in range(400):
        ours, theirs = (generator.random((2, 80)) < 0.1).astype(int)
        first, second = (
            evaluation(np.zeros(80), [1] * 80, answers.tolist())
            for answers in (ours, theirs)
        )
        compared = compare_adapters(first, second, "accuracy", max_resamples=400)
        passed += compared.low is not None and compared.low > 0
    assert passed <= 0.03 * 400


def test_a_pruned_trial_is_no_obstacle(study: Study) -> None:
    assert not study.trials(TrialState.RUNNING)
    assert why_no_answer(study) is None
