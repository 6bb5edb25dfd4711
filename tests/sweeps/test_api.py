"""Studies from Python: what the commands give, in a process that is as it was afterwards."""

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from support.commands import Station
from support.configs import study_overrides
from support.loaded_models import loaded_models
from support.processes import children_with
from support.studies import PRUNED, made_study, trial

import finetune
import sweeps

SPACE = [
    "search=lora_rate",
    "n_trials=3",
    "hydra.sweeper.slots=2",
    "hydra/sweeper/pruner=none",
]


@pytest.fixture(scope="module")
def overrides(tiny_base: Path) -> list[str]:
    """Overrides of a study without its name."""
    words = study_overrides(tiny_base, "s")
    without = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.study_name=s")
    return [*(word for word in words if word not in without), *SPACE]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the studies."""
    with contextlib.chdir(tmp_path_factory.mktemp("api")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def study(place: Path, overrides: list[str]) -> sweeps.Study:
    return sweeps.search(*overrides, "study=s1")


def test_a_study_from_python_is_the_commands(
    study: sweeps.Study, place: Path, overrides: list[str], station: Station
) -> None:
    words = ["-m", "hydra/sweeper=optuna", *overrides, "study=s2"]
    done = station.run(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    other = sweeps.load_study("s2")

    assert study.path == place / "outputs" / "sweeps" / "s1"
    assert (study.name, other.name) == ("s1", "s2")
    columns = ["number", "state", "eval/loss", "note"]
    columns += [f"params_{name}" for name in study.best.params]
    frame = study.trials_dataframe()
    assert frame[columns].equals(other.trials_dataframe()[columns])
    assert list(frame["state"]) == ["complete"] * 3
    assert frame["note"][0] == "baseline"
    assert frame["duration"].notna().all()
    assert (study.best.number, study.best.value) == (
        other.best.number,
        other.best.value,
    )
    names = {path.name for path in study.path.iterdir()}
    assert names == {path.name for path in other.path.iterdir()}


def test_the_best_is_a_run(study: sweeps.Study) -> None:
    best = study.best

    assert best.path == study.path / "best"
    assert best.value == best.objective == study.trials_dataframe()["eval/loss"].min()
    assert study.answer is not None
    assert (study.answer["trial"], study.answer["params"]) == (best.number, best.params)
    assert len(best.generate(["What does math.gcd do in Python?"])) == 1
    assert best.config.optimizer.learning_rate == best.params["optimizer.learning_rate"]


def test_the_same_call_resumes_and_no_base_stays(
    place: Path, overrides: list[str]
) -> None:
    before = loaded_models(), logging.getLogger("hydra").level
    # Another test of this process may have set it.
    hydra_config = HydraConfig.instance().cfg
    first = sweeps.search(*overrides, "study=s3", "n_trials=1")
    second = sweeps.search(*overrides, "study=s3", "n_trials=2")

    assert first == second == sweeps.load_study("s3")
    assert list(second.trials_dataframe()["number"]) == [0, 1]
    assert (loaded_models(), logging.getLogger("hydra").level) == before
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is hydra_config


def test_a_study_without_a_name_has_the_time_as_one(
    place: Path, overrides: list[str]
) -> None:
    study = sweeps.search(*overrides, "n_trials=1")

    assert study.path.parent == place / "outputs" / "sweeps"
    assert study.name == study.path.name
    assert sweeps.load_study() == study
    assert repr(study) == (
        f"<Study outputs/sweeps/{study.name}: 1 complete, 0 pruned, 0 failed>"
    )


@pytest.mark.slow
def test_processes_of_several_workers_end_with_the_study(
    place: Path, overrides: list[str]
) -> None:
    study = sweeps.search(*overrides, "study=s4", "hydra.sweeper.n_jobs=2")

    assert len(study.trials_dataframe()) == 3
    assert not children_with("popen_loky", recursive=True)


def test_the_report_is_written(study: sweeps.Study) -> None:
    (study.path / "report.html").unlink()
    assert study.report() == study.path / "report.html"
    assert "s1" in study.report().read_text()


@pytest.mark.slow
def test_a_confirmation_decides_the_best(study: sweeps.Study) -> None:
    confirmation = study.confirm(top=1, seeds=1)

    assert confirmation == json.loads((study.path / "confirm.json").read_text())
    assert study.best.number == confirmation["winner"]


MISTAKES = [
    ["lora.q=8"],
    ["n_trials=0"],
    ["n_trials=1,2"],
    ["lora.r=choice("],
    ["search=nope"],
    ["hydra.sweeper.trials=3"],
    ["seed=1,2"],
]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_raises_the_commands_line(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    light_station: Station,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = light_station.run("-m", "hydra/sweeper=optuna", *words, cwd=tmp_path)
    with pytest.raises(finetune.ConfigError) as refused:
        sweeps.search(*words)

    assert done.stderr.splitlines()[-1] == f"error: {refused.value}"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("-m", "-m: is a flag of the command line"),
        ("hydra/sweeper=basic", "hydra/sweeper=basic: sweeps.search searches with"),
        ("resume=latest", "resume=latest: finetune.train resumes a run; sweeps.search"),
        ("hydra.sweeper._target_=a.B", "hydra.sweeper._target_=a.B: must be left out"),
    ],
)
def test_what_is_no_search_is_refused(word: str, line: str) -> None:
    with pytest.raises(finetune.ConfigError) as refused:
        sweeps.search(word)
    assert str(refused.value).startswith(line)


def test_a_study_that_is_not_there_is_refused() -> None:
    with pytest.raises(finetune.ConfigError, match=r"^nothing: no such study"):
        sweeps.load_study("nothing")


@pytest.mark.parametrize(
    "arguments", [{"top": 0}, {"seeds": 0}, {"top": "3"}, {"seeds": 1.5}]
)
def test_a_confirmation_takes_positive_numbers(
    study: sweeps.Study, arguments: dict[str, Any]
) -> None:
    with pytest.raises(
        finetune.ConfigError, match=r"=.+: must be a whole number, at least 1"
    ):
        study.confirm(**arguments)


def test_a_study_without_a_winner_has_no_best(tmp_path: Path) -> None:
    import random

    made_study(tmp_path / "s", [trial(random.Random(0), PRUNED)])
    study = sweeps.load_study(tmp_path / "s")

    with pytest.raises(finetune.ConfigError, match=r"^s: .*, so there is no best$"):
        _ = study.best
    frame = study.trials_dataframe()
    assert (frame["state"][0], frame["note"][0]) == (
        "pruned",
        "at step 15: worse than others at this rung",
    )
    assert frame["eval/loss"].notna().all()


@pytest.mark.slow
def test_ctrl_c_leaves_a_study_that_resumes(
    place: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*overrides, "study=s", "n_trials=1", "trainer.max_steps=200"]
    metrics = tmp_path / "outputs" / "sweeps" / "s" / "trials" / "0" / "metrics.jsonl"
    ended = threading.Event()

    def watch() -> None:
        while not (metrics.exists() and "grad_norm" in metrics.read_text()):
            if ended.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt, match="study_name=s goes on"):
            sweeps.search(*words)
    finally:
        ended.set()
        watcher.join()
    assert list(sweeps.load_study("s").trials_dataframe()["state"]) == ["running"]

    study = sweeps.search(*words)

    assert list(study.trials_dataframe()["state"]) == ["complete"]
