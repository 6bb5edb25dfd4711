"""`notify.command` of a study: one notification for each event, with any number of workers."""

import errno
import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState, create_trial
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.notifications import COMMAND, TELLS, told
from support.studies import made_study
from support.study_folder import folder_of

from finetune.config.sections.notify import NotifySettings
from finetune.errors import Interrupted, NoAnswer
from finetune.exit_codes import INTERRUPTED, NO_ANSWER
from sweeps.study.notification import LAST_STEP, notified_at_end, stall_watch


@pytest.mark.fault
def test_a_study_tells_of_each_event_once(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (COMMAND, "n_trials=2", "trainer.max_steps=20", "hydra.sweeper.slots=2")
    study = [*study_overrides(tiny_base, "s"), *more]
    process = station.start(*study, cwd=tmp_path, before=SLOW_STEPS)
    metrics = folder_of(tmp_path) / "trials" / "0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "grad_norm" in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == INTERRUPTED
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    answer = str(folder_of(tmp_path) / "answer.json")
    first, second = told(tmp_path)
    assert (first[0], first[1], first[3]) == ("interrupted", "s", answer)
    assert "the same command with hydra.sweeper.study_name=s goes on" in first[2]
    assert (second[0], second[1], second[3]) == ("completed", "s", answer)
    assert second[2].startswith("study s completed: ")
    assert "notify.command: thanks" in ended.stderr
    # It is no part of what makes trials comparable, and a report is mailed.
    config = json.loads((folder_of(tmp_path) / "trials/0/run.json").read_text())
    assert config["config"]["notify"]["command"][0] == "sh"
    assert "FINETUNE_EVENT" not in (folder_of(tmp_path) / "report.html").read_text()
    other = [word for word in study if word != COMMAND]
    again = station.run(*other, "notify.command=[./none]", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("notify.command=./none: No such file") == 1


@pytest.mark.slow
def test_a_study_without_an_answer_has_failed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    rates = ("~search", "optimizer.learning_rate=choice(1e30,2e30)")
    more = (COMMAND, *rates, "hydra.sweeper.baseline=false", "n_trials=2")
    study = (*study_overrides(tiny_base, "s"), *more, "trainer.max_steps=12")
    ended = station.run(*study, cwd=tmp_path)

    assert ended.returncode == NO_ANSWER, ended.stderr
    ((event, _, message, _),) = told(tmp_path)
    assert event == "failed"
    assert "2 of 2 trials failed" in message


@pytest.mark.fault
def test_stopped_workers_are_told_of_once_and_go_on(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        COMMAND,
        "notify.stalled_minutes=0.1",
        "n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "trainer.max_steps=16",
        "hydra/sweeper/pruner=none",
    )
    process = station.start(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=SLOW_STEPS
    )
    trials = folder_of(tmp_path) / "trials"

    def trains(trial: int) -> bool:
        path = trials / str(trial) / "metrics.jsonl"
        return path.exists() and "grad_norm" in path.read_text()

    wait_until(lambda: trains(0) and trains(1), process)
    wait_until((folder_of(tmp_path) / LAST_STEP).exists, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    # Before their first steps, while they import and load, it may have been told of already.
    (tmp_path / "told").unlink(missing_ok=True)
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: len(told(tmp_path)) == 1, process, seconds=60)
        time.sleep(7)
        assert [line[0] for line in told(tmp_path)] == ["stalled"]
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGCONT)
    ended = process.wait()

    assert ended.returncode == 0, ended.stderr
    events = [line[0] for line in told(tmp_path)]
    # A busy machine may need long to end the workers.
    assert events[-1] == "completed"
    assert set(events[:-1]) == {"stalled"}
    stalled = "study s stalled: no trial has made a step for 0.1 minutes"
    assert told(tmp_path)[0][2] == stalled


def settings(place: Path, **more: float) -> NotifySettings:
    command = ["sh", "-c", f"cd {place}; {TELLS}"]
    return NotifySettings(command=command, **more)


def test_sessions_that_end_together_tell_once(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", [create_trial(value=1.0)])
    notices = settings(tmp_path)
    with notified_at_end(study, notices), notified_at_end(study, notices):
        pass
    assert len(told(tmp_path)) == 1
    with notified_at_end(study, notices):
        pass
    assert len(told(tmp_path)) == 2, "a later session is another event"
    with notified_at_end(study, notices):
        with pytest.raises(NoAnswer), notified_at_end(study, notices):
            raise NoAnswer("none")
        with pytest.raises(Interrupted), notified_at_end(study, notices):
            raise Interrupted("resume")
    events = [line[0] for line in told(tmp_path)]
    assert events[2:] == ["failed", "interrupted", "completed"]


def test_a_session_that_leaves_others_at_work_does_not_call_the_study_completed(
    tmp_path: Path,
) -> None:
    from sweeps.study.study import Study

    running = create_trial(state=TrialState.RUNNING)
    study = made_study(tmp_path / "s", [create_trial(value=1.0), running])
    folder = study.folder_of(1)
    folder.path.mkdir(parents=True)
    with folder.locked(), notified_at_end(study, settings(tmp_path)):
        pass
    assert told(tmp_path) == []
    # Its worker is dead: nobody else will tell.
    with notified_at_end(Study.load(study.folder), settings(tmp_path)):
        pass
    (line,) = told(tmp_path)
    assert line[0] == "completed"
    assert line[2] == "study s completed: 1 complete, 0 pruned, 0 failed"


BLOCKED = ("lock", "attribute", "counts", "temporary files")


def block(
    kind: str, study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a thing fail that a notification uses, as on a full disk."""

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "lock":
        # A folder is no lock file, for any user.
        (study.folder / ".notify.lock").mkdir()
    elif kind == "attribute":
        monkeypatch.setattr(type(study.optuna), "set_user_attr", refuses)
    elif kind == "counts":
        monkeypatch.setattr("sweeps.study.notification.format_counts", refuses)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize(
    ("error", "event"),
    [
        (NoAnswer("none is complete"), "failed"),
        (OSError(errno.ENOSPC, "the disk is full"), "failed"),
        (Interrupted("resume"), "interrupted"),
        (None, "completed"),
    ],
)
def test_a_full_disk_hides_neither_the_error_nor_the_notification(
    kind: str,
    error: Exception | None,
    event: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = made_study(tmp_path / "s", [create_trial(value=1.0)])
    block(kind, study, tmp_path, monkeypatch)
    raised: BaseException | None = None
    try:
        with notified_at_end(study, settings(tmp_path)):
            if error is not None:
                raise error
    except Exception as real:
        raised = real
    assert raised is error
    ((told_event, _, message, _),) = told(tmp_path)
    assert told_event == event
    assert error is None or (error.args[-1] in message)


def test_a_stall_is_told_of_once_though_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study.notification import record_step

    study = made_study(tmp_path / "s", [])
    block("lock", study, tmp_path, monkeypatch)
    (study.folder / ".stalled").symlink_to("/proc/none/stalled")
    (study.folder / LAST_STEP).symlink_to("/proc/none/step")
    notices = settings(tmp_path, stalled_minutes=0.3 / 60)
    with stall_watch(study, notices):
        record_step(study, notices)
        await_told(tmp_path, 1)
        time.sleep(1)
    assert [line[0] for line in told(tmp_path)] == ["stalled"]


def await_told(place: Path, count: int) -> None:
    """Wait until so many events have been told."""
    end = time.monotonic() + 60
    while len(told(place)) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stall_is_told_of_again_after_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import notification
    from sweeps.study.notification import record_step

    looks: list[Path] = []
    written_at = notification._written_at

    def look(path: Path) -> float:
        looks.append(path)
        return written_at(path)

    monkeypatch.setattr(notification, "_written_at", look)

    study = made_study(tmp_path / "s", [])
    notices = settings(tmp_path, stalled_minutes=0.3 / 60)
    with stall_watch(study, notices):
        await_told(tmp_path, 1)
        time.sleep(1)
        assert len(told(tmp_path)) == 1
        record_step(study, notices)
        await_told(tmp_path, 2)
    assert [line[0] for line in told(tmp_path)] == ["stalled"] * 2
    assert len(looks) < 100, "it sleeps"
    assert not list(study.folder.glob(".last-step.*"))
