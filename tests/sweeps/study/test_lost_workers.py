"""Trials whose worker was killed: adopted again, and failed after three losses without progress."""

import json
import os
import signal
import textwrap
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.matrix import further
from support.studies import made_study
from support.study_folder import DIES, LOST, folder_of, read, result_of, trials_of

from finetune.exit_codes import NO_ANSWER
from finetune.files.atomic import write_json
from sweeps.study.starts import needs_isolation, record_start
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


def in_all_processes(code: str, cwd: Path) -> dict[str, Any]:
    """Arguments with which a command runs code first, and each Python process that it starts."""
    cwd.mkdir(parents=True, exist_ok=True)
    # What only watches over workers has no use for the modules that the code imports.
    condition = "import sys\nif 'resource_tracker' not in ' '.join(sys.orig_argv):\n"
    guarded = condition + textwrap.indent(code, "    ")
    (cwd / "sitecustomize.py").write_text(guarded)
    paths = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    return {"before": code, "environment": {"PYTHONPATH": paths}, "cwd": cwd}


@pytest.mark.fault
def test_a_trial_that_kills_its_third_worker_fails_and_the_one_beside_it_does_not(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.slots=2",
        "hydra.sweeper.start=[{lora.dropout: 0.03}]",
    )
    study = [*study_overrides(tiny_base, "s"), *more]
    everywhere = in_all_processes(KILLS, tmp_path)
    for _ in range(2):
        assert station.run(*study, **everywhere).returncode == -signal.SIGKILL
    assert [trial.state for trial in trials_of(tmp_path)] == [
        TrialState.RUNNING,
        TrialState.RUNNING,
        TrialState.WAITING,
    ]
    ended = station.run(*study, **everywhere)
    assert ended.returncode == 0, ended.stderr

    (failed,) = trials_of(tmp_path, TrialState.FAIL)
    assert (failed.number, failed.user_attrs["error"]) == (1, LOST)
    assert failed.user_attrs["starts"] == [0, 0, 0]
    assert result_of(tmp_path, 1)["error"] == LOST
    beside, after = trials_of(tmp_path, TrialState.COMPLETE, TrialState.PRUNED)
    assert (beside.user_attrs["starts"], after.user_attrs["starts"]) == ([0] * 3, [0])


@pytest.mark.fault
def test_a_trial_whose_sessions_are_killed_is_never_failed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    for _ in range(2):
        ended = station.run(*study, cwd=tmp_path, before=DIES)
        assert ended.returncode == -signal.SIGKILL
    metrics = folder_of(tmp_path) / "trials/0/metrics.jsonl"
    slowly = in_all_processes(SLOW_STEPS, tmp_path)
    more = ("hydra.sweeper.allow_change=true", "trainer.max_steps=1000")
    process = station.start(*study, *more, "trainer.save_steps=0", **slowly)
    wait_until(lambda: "train/loss" in read(metrics), process)
    assert "alone" in process.said()
    process.kill()  # with the process in which the trial trains

    assert trials_of(tmp_path)[0].user_attrs["starts"] == [0, 0, 0]
    ended = station.run(*study, more[0], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path, TrialState.COMPLETE)
    assert trial.user_attrs["starts"] == [0, 0, 0, 0]


DIES_ONCE = """
import os
from pathlib import Path
import sweeps.study.trial
record = sweeps.study.trial.record_start
def dies_once(*arguments):
    if {after}:
        record(*arguments)
    if not Path("has_died").exists():
        Path("has_died").touch()
        os.kill(os.getpid(), 9)
    if not {after}:
        record(*arguments)
sweeps.study.trial.record_start = dies_once
"""
"""The first process that starts a trial dies before or after that is recorded."""


@pytest.mark.fault
@pytest.mark.parametrize("when", ["before its start", "after an interruption"])
def test_a_trial_goes_on_whose_own_process_was_lost_without_a_third_loss(
    when: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    for _ in range(2):
        ended = station.run(*study, cwd=tmp_path, before=DIES)
        assert ended.returncode == -signal.SIGKILL
    was_interrupted = when == "after an interruption"
    if was_interrupted:
        result = folder_of(tmp_path) / "trials/0/result.json"
        write_json(result, {"status": "interrupted"})
    code = DIES_ONCE.format(after=was_interrupted)
    ended = station.run(*study, **in_all_processes(code, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "has_died").exists()
    assert "trial 0: its process was lost" in ended.stderr
    (trial,) = trials_of(tmp_path, TrialState.COMPLETE)
    assert trial.user_attrs["starts"] == ([0, 0] if was_interrupted else [0, 0, 0])


def test_an_interruption_excuses_the_losses_before_it_and_none_after_it(
    tmp_path: Path,
) -> None:
    study = made_study(tmp_path / "s", [create_trial(state=TrialState.WAITING)])
    trial = study.optuna.ask()
    folder = study.folder_of(0)
    folder.path.mkdir(parents=True)
    isolated = []
    for status in (None, None, "interrupted", None):
        if status:
            write_json(folder.result, {"status": status})
        isolated.append(needs_isolation(study.trials()[0]))
        record_start(trial, folder)

    assert isolated == [False, False, True, False]
    assert trial.user_attrs["starts"] == [0, 0]
    assert needs_isolation(study.trials()[0])


@pytest.mark.fault
@pytest.mark.parametrize(
    "change",
    ["name=other", *further("sample_prompts=[Why?]", "tracker=tensorboard")],
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
