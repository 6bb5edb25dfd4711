"""Trials whose worker was killed: adopted again, and failed after three losses without progress."""

import json
import signal
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from support.commands import Station, wait_until
from support.configs import study_overrides
from support.study_folder import DIES, LOST, NO_END, folder_of, read, trials_of

from finetune.exit_codes import INTERRUPTED, NO_ANSWER
from sweeps.study.study import FINISHED


@pytest.mark.fault
def test_a_trial_that_lost_its_worker_waits_for_the_next_session_where_time_is_over(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=2"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    ended = station.run(*study, "hydra.sweeper.timeout=0.1", cwd=tmp_path)
    assert ended.returncode == NO_ANSWER, ended.stderr

    assert [trial.state for trial in trials_of(tmp_path)] == [
        TrialState.RUNNING,
        TrialState.WAITING,
    ]
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, TrialState.COMPLETE)) == 2


@pytest.mark.fault
def test_a_trial_that_kills_its_worker_thrice_is_failed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=2",)
    study = study_overrides(tiny_base, "s")
    for _ in range(3):
        assert (
            station.run(*study, *more, cwd=tmp_path, before=DIES).returncode
            == -signal.SIGKILL
        )
        assert trials_of(tmp_path)[0].state == TrialState.RUNNING
    ended = station.run(*study, *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    first, second = trials_of(tmp_path)
    assert (first.state, first.user_attrs["error"]) == (TrialState.FAIL, LOST)
    assert second.state == TrialState.COMPLETE


KILLS = """
import os
from finetune.engine.packed.bank import Bank
learn = Bank.forward_backward
def kills(self, wishes):
    if any(wish.slot.dropout == 0.03 for wish in wishes):
        os.kill(os.getpid(), 9)
    return learn(self, wishes)
Bank.forward_backward = kills
"""
"""A batch of a trial with this dropout kills the process."""


@pytest.mark.fault
def test_a_trial_that_kills_its_worker_does_not_fail_those_beside_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.slots=3",
        "hydra.sweeper.start=[{lora.dropout: 0.03}]",
    )
    study = [*study_overrides(tiny_base, "s"), *more]
    for _ in range(3):
        assert (
            station.run(*study, cwd=tmp_path, before=KILLS).returncode
            == -signal.SIGKILL
        )
    ended = station.run(*study, cwd=tmp_path, before=KILLS)
    assert ended.returncode == 0, ended.stderr

    (failed,) = trials_of(tmp_path, TrialState.FAIL)
    assert (failed.number, failed.user_attrs["error"]) == (1, LOST)
    assert len(trials_of(tmp_path, TrialState.COMPLETE, TrialState.PRUNED)) == 3


@pytest.mark.fault
def test_an_interruption_long_ago_does_not_hide_that_a_trial_kills_its_worker(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1", *NO_END]
    process = station.start(*study, cwd=tmp_path)
    wait_until(
        lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"),
        process,
    )
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == INTERRUPTED
    for _ in range(3):
        assert (
            station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
        )
    station.run(*study, cwd=tmp_path, before=DIES)
    assert trials_of(tmp_path)[0].user_attrs.get("error") == LOST


@pytest.mark.fault
@pytest.mark.parametrize(
    "change", ["name=other", "sample_prompts=[Why?]", "tracker=tensorboard"]
)
def test_what_a_study_lets_change_does_not_fail_a_trial_that_is_taken_on(
    change: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    ended = station.run(*study, change, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs


@pytest.mark.fault
def test_a_trial_that_lost_its_worker_begins_anew_where_the_config_may_change(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    change = ("optimizer.weight_decay=0.1", "hydra.sweeper.allow_change=true")
    ended = station.run(*study, *change, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    config = json.loads(
        (folder_of(tmp_path) / "trials" / "0" / "run.json").read_text()
    )["config"]
    assert config["optimizer"]["weight_decay"] == 0.1


@pytest.mark.slow
def test_fewer_trials_than_before_are_taken_as_the_total(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = study_overrides(tiny_base, "s")
    assert (
        station.run(
            *study, "hydra.sweeper.n_trials=5", cwd=tmp_path, before=DIES
        ).returncode
        == -signal.SIGKILL
    )
    ended = station.run(*study, "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, *FINISHED)) == 2


def test_optuna_reads_a_journal_without_us(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = study_overrides(tiny_base, "s")
    assert (
        station.run(
            *study, "hydra.sweeper.n_trials=2", cwd=tmp_path, before=DIES
        ).returncode
        == -signal.SIGKILL
    )
    storage = JournalStorage(
        JournalFileBackend(str(folder_of(tmp_path) / "study.journal"))
    )
    assert len(optuna.load_study(study_name="s", storage=storage).trials) == 2
