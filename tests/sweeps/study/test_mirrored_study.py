"""mirror=URL: runs and studies of a machine that is lost go on elsewhere."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import study_overrides, tiny_overrides
from support.driving import session_of
from support.studies import made_study, settings_of
from support.study_folder import (
    DIES,
    SMALL_MEMORY,
    folder_of,
    read,
    result_of,
    trials_of,
)

from finetune.errors import ConfigError
from finetune.files.atomic import write_json
from finetune.files.mirror import NO_MIRROR, Mirror
from sweeps.space.space import Space
from sweeps.study.claims import orphaned_trials
from sweeps.study.creation import create_or_resume
from sweeps.study.mirrored import (
    fetch_journal,
    fetch_study,
    fetch_trial,
    fetch_trials,
)
from sweeps.study.storage import JOURNAL
from sweeps.study.study import Study
from sweeps.study.worker import _TrialSource


def lose(process: Forked, machine: Path) -> None:
    """Kill all processes of a machine, and remove its disk.

    A run's run.json is copied after its checkpoint: where it is not there yet, the run is lost.
    """
    process.kill()
    machine.rename(machine.with_name("lost"))


def steps_of(run: Path) -> list[int]:
    """The steps of a run's logged training losses."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.mark.fault
def test_a_run_goes_on_from_its_last_copied_checkpoint(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    words = [
        *tiny_overrides(tiny_base),
        "name=a",
        "trainer.max_steps=8",
        "trainer.save_steps=1",
        f"mirror={tmp_path / 'copies'}",
    ]
    machine = tmp_path / "first"
    process = station.start(*words, cwd=machine, before=SLOW_STEPS)
    copies = tmp_path / "copies" / "outputs" / "runs" / "a"
    wait_until(lambda: any(copies.glob("*/run.json")), process)
    lose(process, machine)

    other = tmp_path / "second"
    resumed = station.run("resume=a", words[-1], cwd=other)

    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    (run,) = (other / "outputs" / "runs" / "a").iterdir()
    assert steps_of(run) == list(range(1, 9))
    copy = copies / run.name
    assert json.loads(read(copy / "result.json"))["status"] == "completed"
    assert (copy / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(copy.glob("checkpoints/*/*"))


@pytest.mark.fault
def test_a_study_goes_on_with_the_trials_that_it_had(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=3",
        "trainer.max_steps=6",
        "trainer.save_steps=1",
        f"mirror={copies}",
    ]
    machine = tmp_path / "first"
    process = station.start(*words, cwd=machine, before=SLOW_STEPS)
    trials = copies / "outputs" / "sweeps" / "s" / "trials"
    wait_until(lambda: any(trials.glob("1/run.json")), process)
    lose(process, machine)
    first = read(trials / "0" / "metrics.jsonl")

    other = tmp_path / "second"
    ended = station.run(*words, cwd=other)

    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(other, TrialState.COMPLETE)) == 3
    assert "files fetched from the mirror" in ended.stderr
    # Only the test rows are evaluated again, at the study's end.
    again = read(folder_of(other) / "trials" / "0" / "metrics.jsonl")
    assert again.startswith(first)
    assert steps_of(folder_of(other) / "trials" / "0") == list(range(1, 7))
    assert "resuming after step" in read(
        folder_of(other) / "trials" / "1" / "train.log"
    )
    assert steps_of(folder_of(other) / "trials" / "1") == list(range(1, 7))
    copied = copies / "outputs" / "sweeps" / "s"
    assert (copied / "answer.json").is_file()
    assert (copied / "best" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_began_without_a_mirror_is_copied_to_that_of_resume(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    begun = station.run(
        *tiny_overrides(tiny_base), "name=a", "trainer.max_steps=1", cwd=tmp_path
    )
    assert begun.returncode == 0, begun.stderr
    copies = tmp_path / "copies"
    environment = {"MIRROR": str(copies)}

    words = ("resume=a", "mirror=${oc.env:MIRROR}")
    resumed = station.run(*words, cwd=tmp_path, environment=environment)

    assert resumed.returncode == 0, resumed.stderr
    (copy,) = copies.glob("outputs/runs/a/*")
    assert (copy / "adapter" / "adapter_model.safetensors").is_file()


def test_only_trials_of_a_later_state_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = {"starts": [0]}
    trials = [
        create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=started),
        create_trial(state=TrialState.RUNNING, user_attrs=started),
        create_trial(state=TrialState.RUNNING),
    ]
    study = made_study(tmp_path / "s", trials)
    mirror = Mirror("copies")
    for state in ("newer", "older"):
        for number in range(3):
            run = study.folder_of(number)
            run.path.mkdir(parents=True, exist_ok=True)
            run.identity.write_text(state)
        if state == "newer":
            write_json(study.folder_of(0).result, {"status": "completed"})
            mirror.copy(study.folder)
            Mirror.finish()
            study.folder_of(0).result.unlink()

    def states() -> list[str]:
        return [study.folder_of(number).identity.read_text() for number in range(3)]

    fetch_trials(mirror, study, is_later=False)
    assert states() == ["newer", "older", "older"]
    fetch_trials(mirror, study, is_later=True)
    assert states() == ["newer", "newer", "older"]


def test_resume_shows_no_secret_of_a_mirror(station: Station, tmp_path: Path) -> None:
    environment = {"MIRROR": "ftp://me:hunter22@host/x"}
    words = ("resume=a", "mirror=${oc.env:MIRROR}")
    refused = station.run(*words, cwd=tmp_path, environment=environment)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: mirror: a password in an address")
    assert "hunter22" not in refused.stderr


def test_resume_names_the_mirror_that_has_no_such_run(
    station: Station, tmp_path: Path
) -> None:
    done = station.run("resume=b", f"mirror={tmp_path / 'copies'}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: resume=b: no such run")


def study_words(tiny_base: Path, copies: Path, trials: int) -> list[str]:
    return [
        *study_overrides(tiny_base, "s"),
        f"hydra.sweeper.n_trials={trials}",
        "hydra.sweeper.baseline_seeds=0",
        "trainer.save_steps=1",
        f"mirror={copies}",
    ]


def weights_in(place: Path) -> set[str]:
    """The trials that have an adapter in a directory or its copy."""
    trials = folder_of(place) / "trials"
    return {path.parts[-3] for path in trials.glob("*/adapter/*.safetensors")}


def start_trial(
    station: Station, words: list[str], copies: Path, machine: Path
) -> Forked:
    """Start a study, and wait until its first trial has a copied checkpoint."""
    process = station.start(*words, cwd=machine, before=SLOW_STEPS)
    trial = folder_of(copies) / "trials" / "0"
    wait_until(lambda: any(trial.glob("run.json")), process)
    return process


@pytest.mark.slow
def test_a_trial_that_ran_out_of_memory_trains_again_with_a_mirror(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=1)
    batch = "trainer.per_device_train_batch_size=4"
    ended = station.run(*words, batch, cwd=tmp_path, before=SMALL_MEMORY)

    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path, TrialState.COMPLETE)
    assert trial.user_attrs["shrunk"]
    for place in (tmp_path, copies):
        run = json.loads(read(folder_of(place) / "trials" / "0" / "run.json"))
        assert run["config"]["trainer"]["per_device_train_batch_size"] == 2


@pytest.mark.fault
@pytest.mark.parametrize("other", ["first", "second"])
def test_a_lost_trial_begins_anew_where_the_config_may_change(
    other: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=1)
    start_trial(station, words, copies, tmp_path / "first").kill()

    change = ("optimizer.weight_decay=0.1", "hydra.sweeper.allow_change=true")
    ended = station.run(*words, *change, cwd=tmp_path / other)

    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path / other)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    for place in (tmp_path / other, copies):
        run = json.loads(read(folder_of(place) / "trials" / "0" / "run.json"))
        assert run["config"]["optimizer"]["weight_decay"] == 0.1


@pytest.mark.fault
def test_an_interruption_excuses_no_loss_after_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=1)
    process = start_trial(station, words, copies, tmp_path / "first")
    process.send_signal(signal.SIGINT)
    process.wait()
    assert result_of(copies, 0)["status"] == "interrupted"

    other = tmp_path / "second"
    for _ in range(2):
        ended = station.run(*words, cwd=other, before=DIES)
        assert ended.returncode == -signal.SIGKILL
    ended = station.run(*words, cwd=other)

    assert "trial 0: alone, as it has lost two workers" in ended.stderr
    (trial,) = trials_of(other, TrialState.COMPLETE)
    assert len(trial.user_attrs["starts"]) == 3


@pytest.mark.slow
def test_removed_adapters_stay_removed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=4)
    words.append("hydra.sweeper.keep_adapters=1")
    ended = station.run(*words, cwd=tmp_path / "first")
    assert ended.returncode == 0, ended.stderr
    weights = weights_in(tmp_path / "first")
    assert 1 <= len(weights) < 4
    assert weights_in(copies) == weights

    again = station.run(*words, cwd=tmp_path / "first")
    assert again.returncode == 0, again.stderr
    assert "fetched" not in again.stderr
    elsewhere = station.run(*words, cwd=tmp_path / "second")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert weights_in(tmp_path / "second") == weights
    assert [trial.state for trial in trials_of(tmp_path / "second")] == [
        TrialState.COMPLETE
    ] * 4


@pytest.mark.fault
def test_a_machine_that_comes_back_takes_what_another_has_done(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=3)
    first, second = tmp_path / "first", tmp_path / "second"
    process = start_trial(station, words, copies, first)
    process.send_signal(signal.SIGTERM)
    process.wait()
    ended = station.run(*words, cwd=second)
    assert ended.returncode == 0, ended.stderr

    back = station.run(*words, cwd=first)

    assert back.returncode == 0, back.stderr
    assert "is full (3 trials)" in back.stderr
    for place in (first, copies):
        trials = [
            (trial.params, trial.values, trial.user_attrs["starts"])
            for trial in trials_of(place, TrialState.COMPLETE)
        ]
        assert trials == [
            (trial.params, trial.values, trial.user_attrs["starts"])
            for trial in trials_of(second)
        ]
    for number in range(3):
        assert result_of(first, number) == result_of(second, number)
    assert not list(folder_of(first).glob("trials/*/checkpoints/*"))


@pytest.mark.slow
def test_two_machines_that_went_on_apart_are_not_mixed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = study_words(tiny_base, copies, trials=1)
    first, second = tmp_path / "first", tmp_path / "second"
    assert station.run(*words, cwd=first).returncode == 0
    shutil.copytree(first, second)
    # Without the mirror, and then with it.
    more = "hydra.sweeper.n_trials=2"
    assert station.run(*words[:-1], more, cwd=second).returncode == 0
    assert station.run(*words, more, cwd=first).returncode == 0
    journal = Path("outputs/sweeps/s/study.journal")
    copied = read(copies / journal)

    refused = station.run(*words, more, cwd=second)

    assert refused.returncode == 1
    (line,) = [
        line for line in refused.stderr.splitlines() if line.startswith("error:")
    ]
    assert line.startswith(
        f"error: mirror: its copy of {second / journal} and the file"
    )
    assert read(copies / journal) == copied


@pytest.mark.slow
def test_studies_outside_the_working_directory_are_not_mixed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    for rank in (4, 8):
        ended = station.run(
            *study_words(tiny_base, copies, trials=1),
            f"hydra.sweep.dir={tmp_path}/scratch/{rank}",
            f"lora.r={rank}",
            "search=[]",
            "optimizer.learning_rate=choice(1e-3,1e-2)",
            cwd=tmp_path / "work",
        )
        assert ended.returncode == 0, ended.stderr
        assert "fetched" not in ended.stderr


@pytest.mark.parametrize("begun", [None, "sqlite:///s.db"])
def test_a_new_study_takes_no_folder_of_another_in_the_mirror(
    begun: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copies" / "s" / "trials" / "0"
    copy.mkdir(parents=True)
    write_json(copy / "run.json", {})
    folder, mirror = Path("s"), Mirror("copies")

    def create() -> None:
        terms = {"objective": "eval/loss"}
        create_or_resume(folder, settings_of(), begun, terms, {}, mirror=mirror)

    # A new one, and one that has been refused before.
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"trials are in the mirror's copy of s, "
        ):
            create()
    assert not (folder / "trials").exists()


def test_a_trial_whose_copy_cannot_be_read_is_left_to_a_later_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    trials = [
        create_trial(state=TrialState.RUNNING, user_attrs={"starts": [0]}),
        create_trial(state=TrialState.WAITING),
    ]
    study = made_study(tmp_path / "s", trials)
    study.optuna.set_user_attr("total", 2)
    copy = tmp_path / "copies" / "s" / "trials" / "0"
    copy.mkdir(parents=True)
    write_json(copy / "run.json", {})
    (copy / "metrics.jsonl").symlink_to("nowhere")
    session = session_of(space=Space.parse({}, []), seed=0, folder=tmp_path)
    common = dataclasses.replace(session.common, mirror=str(tmp_path / "copies"))
    source = _TrialSource(dataclasses.replace(session, common=common), study)

    run = source.next_run(lambda _: True)

    assert run is not None
    assert run.name == "1"
    (line,) = caplog.messages
    assert line.startswith("trial 0: mirror=")
    assert line.endswith("it stays running, to be adopted later")
    # Another worker finds it free, and without a log that would count as begun here.
    (copy / "metrics.jsonl").unlink()
    assert [trial.number for trial in orphaned_trials(study)] == [0]
    fetch_trial(Mirror("copies"), study.folder_of(0))
    assert study.folder_of(0).identity.exists()
    run.close()


def test_without_a_mirror_no_trial_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = made_study(tmp_path / "s", [create_trial(value=1.0)])
    result = study.folder_of(0).result
    result.parent.mkdir(parents=True)
    # To read it is an error.
    result.write_text("no JSON")
    fetch_study(NO_MIRROR, study)


def test_an_interrupted_fetch_of_a_later_state_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mirror = Mirror("copies")
    trial = create_trial(state=TrialState.RUNNING, user_attrs={"starts": [0]})
    study = made_study(tmp_path / "s", [trial])
    journal, run = study.folder / JOURNAL, study.folder_of(0)
    answer, best = study.folder / "answer.json", study.folder / "best"
    run.path.mkdir(parents=True)
    best.mkdir()
    older = journal.read_bytes()
    study.optuna.set_user_attr("later", True)
    for path in (run.identity, answer, best / "run.json"):
        path.write_text("later")
    mirror.copy(study.folder)
    Mirror.finish()
    # The machine comes back.
    journal.write_bytes(older)
    for path in (run.identity, answer, best / "run.json", best / "samples.json"):
        path.write_text("older")
    study = Study.load(study.folder)

    broken = tmp_path / "copies" / "s" / "trials" / "0" / "samples.json"
    broken.symlink_to("nowhere")
    fetch_journal(mirror, journal)
    with pytest.raises(ConfigError, match=r"^mirror=copies: can't be read"):
        fetch_study(mirror, study)
    broken.unlink()
    fetch_journal(mirror, journal)
    fetch_study(mirror, study)

    for path in (run.identity, answer, best / "run.json"):
        assert path.read_text() == "later"
    assert not (best / "samples.json").exists()
    # Once only.
    for path in (run.identity, answer):
        path.write_text("goes on here")
    fetch_journal(mirror, journal)
    fetch_study(mirror, study)
    assert run.identity.read_text() == answer.read_text() == "goes on here"
