"""The best trials trained anew with other seeds: what is compared, how the answer changes, kills
and interruptions."""

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import create_trial
from support.commands import SLOW_STEPS, Station
from support.configs import study_overrides
from support.runs import final
from support.studies import made_study

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.exit_codes import INTERRUPTED
from finetune.files.atomic import write_json
from finetune.files.mirror import NO_MIRROR
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from finetune.run.resources import SharedResources
from sweeps.answer.commands import commands
from sweeps.answer.conclusion import conclude
from sweeps.answer.confirm import confirm
from sweeps.answer.confirmation import read_confirmation
from sweeps.answer.descriptions import confirmation_lines
from sweeps.study.adapters import remove_adapters
from sweeps.study.repeats import Repeat
from sweeps.study.study import Study

POINTS = (
    "[{lora.r: 8, lora.alpha: 64, lora.dropout: 0.0, optimizer.learning_rate: 0.009}]"
)


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A study of a baseline, a far better point and two more trials, confirmed with one seed at
    its end."""
    place = tmp_path_factory.mktemp("confirmed")
    more = (
        "hydra/sweeper/pruner=none",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.confirm=1",
    )
    ended = station.run(
        *study_overrides(tiny_base, "s1"),
        f"hydra.sweeper.start={POINTS}",
        *more,
        cwd=place,
    )
    assert ended.returncode == 0, ended.stderr
    (place / "said").write_text(ended.stderr)
    return place / "outputs" / "sweeps" / "s1"


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """A copy of the study, to be acted on."""
    folder = tmp_path / "outputs" / "sweeps" / "s1"
    shutil.copytree(done, folder)
    return folder


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_study_ends_with_it(done: Path) -> None:
    found, answer = content(done / "confirm.json"), content(done / "answer.json")
    said = (done.parents[2] / "said").read_text()

    assert found["seeds"] == [1]
    trials = [row["trial"] for row in found["candidates"]]
    assert trials[0] == found["before"] == found["winner"] == answer["trial"] == 1
    assert 0 in trials
    assert re.search(r"confirmed +trial 1: eval/loss \d\.\d+ with 1 other seed\b", said)
    assert "Confirmation" in (done / "report.html").read_text()


def test_each_run_is_the_trial_with_another_seed(done: Path) -> None:
    found = content(done / "confirm.json")

    for row in found["candidates"]:
        (folder,) = (done / "confirm").glob(f"{row['trial']}-seed*")
        again, trial = (
            content(run / "run.json")["config"]
            for run in (folder, done / "trials" / str(row["trial"]))
        )
        assert again.pop("seed") == 1
        assert trial.pop("seed") == 0
        assert again == trial
        assert row["values"] == [final(folder)["metrics"]["eval/loss"]]
        assert row["test"] == final(folder)["metrics"]["test/loss"]
        assert (
            row["study"]
            == final(done / "trials" / str(row["trial"]))["metrics"]["eval/loss"]
        )
        assert not (folder / "adapter").exists()
        assert not (folder / "checkpoints").exists()


def test_no_trial_has_seen_the_test_rows_but_winner_and_baseline(done: Path) -> None:
    seen = {path.parent.name for path in done.glob("trials/*/test_rows.json")}

    assert seen == {"0", "1"}


@pytest.mark.slow
def test_more_seeds_train_only_what_is_missing(copied: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in copied.glob("confirm/*/run.json")
    }

    found = confirm(Study.load(copied), seeds=3, top=1)

    assert found["seeds"] == [1, 2, 3]
    assert [row["trial"] for row in found["candidates"]] == [1, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    best, baseline = found["candidates"]
    assert len(best["values"]) == len(set(best["values"])) == 3
    assert best["mean"] == pytest.approx(sum(best["values"]) / 3)
    assert best["spread"] == pytest.approx(float(np.std(best["values"], ddof=1)))
    (pair,) = found["comparisons"]
    assert (pair["trial"], pair["other"]) == (1, 0)
    assert pair["difference"] == pytest.approx(best["test"] - baseline["test"])
    assert (pair["seeds"], pair["metric"]) == (3, "test/loss")
    assert pair["verdict"] == "too few rows to say"


def made_lucky(folder: Path, number: int) -> None:
    """Let the study have recorded an outstanding loss for a trial, as a lucky seed gives."""
    journal = folder / "study.journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    ids = [
        line for line in lines if line["op_code"] == 4
    ]  # trials, as they were created
    assert len(ids) > number
    for line in lines:
        if line["op_code"] == 6 and line["trial_id"] == number and line.get("values"):
            line["values"] = [0.5]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_luck_changes_the_answer(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied / "confirm.json").unlink()
    made_lucky(copied, 0)
    assert Study.load(copied).ranked()[0].number == 0

    found = confirm(Study.load(copied), seeds=2, top=2)
    conclude(Study.load(copied), resources=SharedResources())

    assert (found["before"], found["winner"]) == (0, 1)
    assert content(copied / "answer.json")["trial"] == 1
    assert (
        content(copied / "best" / "run.json")["config"]["optimizer"]["learning_rate"]
        == 0.009
    )
    assert "trial 1 of study s1" in (copied / "experiment" / "best.yaml").read_text()
    assert "Trial 1 wins" in (copied / "report.html").read_text()
    assert (
        "trial 1 has a better mean than trial 0" in (copied / "report.html").read_text()
    )


def test_a_winner_whose_adapter_is_gone_has_one_of_the_runs_anew(copied: Path) -> None:
    made_lucky(copied, 0)
    shutil.rmtree(copied / "trials" / "1" / "adapter")

    confirm(Study.load(copied), seeds=2, top=2)
    conclude(Study.load(copied), resources=SharedResources())

    assert content(copied / "best" / "run.json")["config"]["seed"] in (1, 2)
    assert (copied / "best" / "adapter" / "adapter_model.safetensors").is_file()
    assert "seed: 2" in (copied / "experiment" / "best.yaml").read_text()


def test_a_better_trial_that_came_later_is_not_confirmed(copied: Path) -> None:
    study = Study.load(copied)
    assert read_confirmation(study) is not None
    made_lucky(copied, 2)

    assert read_confirmation(Study.load(copied)) is None


def test_a_run_that_fails_is_its_candidates_failure(copied: Path) -> None:
    other = copied / "confirm" / "1-seed2"
    shutil.copytree(
        copied / "confirm" / "1-seed1", other
    )  # holds another run, so it is refused

    found = confirm(Study.load(copied), seeds=2, top=1)

    best, baseline = found["candidates"]
    assert "seed=2" in best["failed"][0]
    assert len(best["values"]) == 1
    assert baseline["failed"] == []
    assert found["winner"] == 0


def test_what_cannot_be_confirmed_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.load(copied)
    monkeypatch.setattr(Study, "objectives", ["eval/loss", "adapter/parameters"])
    with pytest.raises(ConfigError, match="several objectives"):
        confirm(study, seeds=1)
    monkeypatch.undo()
    monkeypatch.setattr(Study, "ranked", lambda self: [])
    with pytest.raises(ConfigError, match="nothing to confirm"):
        confirm(study, seeds=1)


@pytest.fixture
def written(tmp_path: Path, tiny: Callable[..., RunConfig]) -> Study:
    """A study of three trials whose runs are written down, not trained."""
    losses = (1.0, 2.0, 3.0)
    trials = [
        create_trial(value=loss, user_attrs={"role": "" if loss < 3 else "baseline"})
        for loss in losses
    ]
    study: Study = made_study(tmp_path / "s", trials)
    for number in range(3):
        began(study.folder_of(number), tiny())
        study.folder_of(number).adapter.mkdir()
    return study


def began(folder: RunFolder, config: RunConfig) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.identity, {"config": config.with_absolute_paths().to_dict()})


def ended(folder: Path, loss: float, test: float) -> None:
    """Write down that a run has come to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "result.json",
        {"status": "completed", "metrics": {"eval/loss": loss, "test/loss": test}},
    )
    write_json(
        folder / "test_rows.json",
        {"row_losses": [test] * 40, "row_tokens": [1] * 40, "row_correct": [0] * 40},
    )


def test_no_seed_is_one_that_a_candidate_had_in_the_study(
    written: Study, tiny: Callable[..., RunConfig]
) -> None:
    began(written.folder_of(1), tiny("seed=7"))  # it was searched
    for trial in (0, 1, 2):
        for seed in (8, 9):
            ended(
                written.folder / "confirm" / f"{trial}-seed{seed}",
                loss=trial + seed,
                test=trial,
            )

    assert confirm(written, seeds=2)["seeds"] == [8, 9]


def test_two_confirmations_at_once_come_one_after_the_other(
    written: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.answer import confirm as module

    second = threading.Thread(target=confirm, args=(written, 1))
    order: list[str] = []

    def train(*_: Any) -> dict[Path, str]:
        name = "second" if threading.current_thread() is second else "first"
        order.append(f"{name} begins")
        if name == "first":
            second.start()
            second.join(0.5)
            for trial in (0, 1, 2):
                ended(
                    written.folder / "confirm" / f"{trial}-seed1",
                    loss=trial,
                    test=trial,
                )
        order.append(f"{name} ends")
        return {}

    monkeypatch.setattr(module, "retrain", train)
    confirm(written, 1)
    second.join()

    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_what_the_confirmation_says_is_so(
    written: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.answer import confirm as module

    for trial, loss in ((0, 1.0), (1, 2.0), (2, 3.0)):
        for seed in (1, 2):
            ended(
                written.folder / "confirm" / f"{trial}-seed{seed}", loss=loss, test=loss
            )
    broken = written.folder / "confirm" / "0-seed2"
    monkeypatch.setattr(module, "retrain", lambda *_: {broken: "out of memory"})

    lines = confirmation_lines(confirm(written, seeds=2))

    assert "trial 0, the study's best, has failed runs: trial 1 is the winner" in lines
    assert not [line for line in lines if "better mean" in line]
    (against,) = [line for line in lines if "compared with trial 2" in line]
    assert against.endswith("better with a confidence of more than 99%")
    difference = "test loss -1.0000, 95 % interval -1.0000 to -1.0000 on 40 test"
    assert against.startswith(f"trial 1 compared with trial 2: {difference}")


def test_the_adapter_of_a_confirmed_winner_stays(written: Study) -> None:
    for trial in (0, 1, 2):
        ended(
            written.folder / "confirm" / f"{trial}-seed1",
            loss=abs(trial - 1),
            test=trial,
        )
    assert confirm(written, seeds=1)["winner"] == 1

    written.optuna.add_trial(create_trial(value=1.5))
    remove_adapters(written, keep=2, mirror=NO_MIRROR)

    assert read_confirmation(written) is not None
    assert [
        trial for trial in (0, 1, 2) if written.folder_of(trial).adapter.is_dir()
    ] == [0, 1, 2]


def test_a_winner_whose_adapters_are_all_gone_is_trained_once_more(
    written: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (0, 1, 2):
        for seed in (1, 2):
            ended(
                written.folder / "confirm" / f"{trial}-seed{seed}",
                loss=trial,
                test=trial,
            )
    written.folder_of(0).adapter.rmdir()
    trained: list[list[str]] = []

    def train(_: Study, repeats: Sequence[Repeat]) -> dict[Path, str]:
        trained.append([repeat.folder.path.name for repeat in repeats])
        if len(trained) == 2:
            repeats[0].folder.adapter.mkdir()
        return {}

    monkeypatch.setattr("sweeps.answer.confirm.retrain", train)
    confirm(written, seeds=2)

    assert trained[1:] == [["0-seed1"]]
    assert [path.parent.name for path in written.folder.glob("confirm/*/adapter")] == [
        "0-seed1"
    ]


def test_no_answer_replaces_one_that_has_its_adapter(written: Study) -> None:
    best = written.folder / "best" / "adapter"
    best.mkdir(parents=True)
    written.folder_of(0).adapter.rmdir()
    ended(written.folder_of(0).path, loss=1.0, test=1.0)

    refusal = (
        r"adapter of its winner, trial 0, is not in .*trials/0; best/ stays unchanged"
    )
    with pytest.raises(ConfigError, match=refusal):
        conclude(written, resources=SharedResources())

    assert best.is_dir()
    assert (written.folder / "report.html").is_file()


def test_says_which_run_the_answer_is_of(
    written: Study, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    best = f"{os.path.relpath(written.folder)}/best:"
    written.folder_of(0).adapter.rename(written.folder / "aside")
    again = written.folder / "confirm" / "0-seed1"
    began(RunFolder(again), read_run_config(written.folder_of(0).path))
    for run in (again, *(written.folder_of(trial).path for trial in (0, 2))):
        ended(run, loss=1.0, test=1.5)
        write_json(run / "samples.json", [{"prompt": "?", "before": "", "after": ""}])
    (again / "adapter").mkdir()

    conclude(written, resources=SharedResources())
    assert (
        f"{best} trial 0, retrained in confirm/0-seed1, because its first adapter was removed"
        in caplog.text
    )

    (written.folder / "aside").rename(written.folder_of(0).adapter)
    conclude(written, resources=SharedResources())
    assert f"{best} the run folder of trial 0" in caplog.text


def test_a_baseline_whose_adapter_is_gone_is_not_measured(
    written: Study, caplog: pytest.LogCaptureFixture
) -> None:
    written.folder_of(2).adapter.rmdir()
    ended(written.folder_of(0).path, loss=1.0, test=1.5)
    write_json(
        written.folder_of(0).samples, [{"prompt": "?", "before": "", "after": ""}]
    )

    conclude(written, resources=SharedResources())

    assert content(written.folder / "answer.json")["test"] == {
        "rows": 40,
        "looks": 1,
        "winner": 1.5,
    }
    assert "trial 2, the baseline, is not evaluated: its adapter is gone" in caplog.text
    assert "baseline itself" not in (written.folder / "report.html").read_text()


def test_wandb_calls_the_confirmed_winner_the_best(
    written: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in ("_only_file", "change_tags"):
        name = f"finetune.tracking.wandb_finished.{function}"
        monkeypatch.setattr(name, lambda *_: None)
    monkeypatch.setattr("sweeps.answer.conclusion.publish", lambda *_: [])
    for trial, tags in ((0, ["mine", "best"]), (1, ["mine"]), (2, None)):
        ended(written.folder_of(trial).path, loss=trial, test=trial)
        ended(
            written.folder / "confirm" / f"{trial}-seed1",
            loss=abs(trial - 1),
            test=trial,
        )
        write_json(
            written.folder_of(trial).samples,
            [{"prompt": "?", "before": "", "after": ""}],
        )
        write_json(
            written.folder_of(trial).path / "tracker.json",
            {"mode": "offline", "tags": tags},
        )
    assert confirm(written, seeds=1)["winner"] == 1

    conclude(written, resources=SharedResources())

    tags_of = {
        trial: content(written.folder_of(trial).path / "tracker.json")["tags"]
        for trial in (0, 1, 2)
    }
    assert tags_of == {0: ["mine"], 1: ["mine", "best"], 2: None}


def offline_run(folder: Path, run_id: str) -> Path:
    """The file of an offline W&B run."""
    file = folder / "wandb" / f"offline-run-1-{run_id}" / f"run-{run_id}.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_the_command_for_wandb_is_shown_as_long_as_it_sends_something(
    written: Study,
) -> None:
    place = os.path.relpath(written.folder)
    assert "W&B" not in dict(commands(written))
    first = offline_run(written.folder, f"{written.uid}-0-seed1")
    assert dict(commands(written))["W&B"] == f"wandb sync {place}/wandb"
    Path(f"{first}.synced").touch()
    assert "W&B" not in dict(commands(written))
    offline_run(written.folder, f"{written.uid}-1")
    assert dict(commands(written))["W&B"] == f"wandb sync {place}/wandb"


def test_runs_of_a_study_of_before_are_synced_too(written: Study) -> None:
    offline_run(written.folder / "trials" / "0", f"{written.uid}-0")
    place = os.path.relpath(written.folder)
    pattern = f"{place}/*/*/wandb/offline-run-*"
    assert dict(commands(written))["W&B"] == f"wandb sync {pattern}"


def test_runs_in_a_folder_of_the_users_are_synced_without_those_of_other_studies(
    written: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    offline_run(tmp_path, "other-0")
    assert "W&B" not in dict(commands(written))
    offline_run(tmp_path, f"{written.uid}-0")
    pattern = f"wandb/offline-run-*-{written.uid}-*"
    assert (
        dict(commands(written))["W&B"]
        == f"wandb sync {os.path.relpath(tmp_path)}/{pattern}"
    )


@pytest.mark.parametrize("flag", ["--seeds=0", "--top=x"])
def test_wrong_numbers_are_one_line(flag: str, station: Station, copied: Path) -> None:
    ended = station.run("confirm", "s1", flag, cwd=copied.parents[2], module="sweeps")

    assert ended.returncode == 1
    assert re.fullmatch(
        r"error: --\w+=\w+: must be a whole number, at least 1\n",
        ended.stderr,
    )


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_goes_on_after_it_was_ended(
    number: signal.Signals, station: Station, copied: Path, done: Path
) -> None:
    def begin() -> Any:
        arguments = ("confirm", "s1", "--top", "1", "--seeds", "3")
        return station.start(
            *arguments, cwd=copied.parents[2], module="sweeps", before=SLOW_STEPS
        )

    ended = 0
    for _ in range(3):
        running = begin()
        end = time.monotonic() + 60
        runs = len(list(copied.glob("confirm/*/metrics.jsonl")))
        while running.poll() is None and time.monotonic() < end:
            if len(list(copied.glob("confirm/*/metrics.jsonl"))) > runs:
                break
            time.sleep(0.005)
        if running.poll() is None:
            running.send_signal(number)
            said = running.wait()
            ended += said.returncode != 0
            if number == signal.SIGINT and said.returncode:
                assert said.returncode == INTERRUPTED
                assert (
                    "resume with: python -m sweeps confirm outputs/sweeps/s1 --top 1 --seeds 3\n"
                    in said.stderr
                )
    assert ended
    last = begin().wait()
    assert last.returncode == 0, last.stderr

    found = content(copied / "confirm.json")
    fresh = copied.with_name("fresh")
    shutil.copytree(done, fresh)
    assert (
        found["candidates"] == confirm(Study.load(fresh), seeds=3, top=1)["candidates"]
    )
