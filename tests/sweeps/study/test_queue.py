"""Sessions as jobs of a queue: Slurm's, and processes of this machine."""

import errno
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.notifications import COMMAND, TELLS, told
from support.processes import children_with
from support.slurm import Cluster, running_cluster
from support.studies import settings_of, sweeper_config

from finetune.config.sections.notify import NotifySettings
from finetune.errors import ConfigError, Interrupted
from finetune.exit_codes import INTERRUPTED
from finetune.files.atomic import write_json
from sweeps.queued_session import QueuedSession
from sweeps.study.errors import StorageLost, WorkersLost
from sweeps.study.queue import _parameters, job_workers, queue_name
from sweeps.study.queued_jobs import OUTCOME, describe_queued, write_queued
from sweeps.study.queued_notification import QueuedStudy
from sweeps.study.study import Study
from sweeps.sweeper import StudySweeper

LOCAL = "hydra/launcher=submitit_local"
SLURM = "hydra/launcher=slurm"
DETACH = "hydra.sweeper.detach=true"
NO_GPUS = "hydra.launcher.gpus_per_node=0"


def queue_of(*overrides: str) -> str | None:
    return queue_name(sweeper_config(*overrides), settings_of(*overrides))


def test_only_a_launcher_with_a_queue_can_be_left() -> None:
    assert queue_of() is None
    assert queue_of(LOCAL) is None
    assert queue_of(LOCAL, DETACH) == "local"
    assert queue_of(SLURM) == queue_of(SLURM, DETACH) == "slurm"
    assert queue_of("hydra/launcher=submitit_slurm", DETACH) == "slurm"
    for launcher in ("slots", "basic", "joblib", "ray"):
        with pytest.raises(ConfigError) as refused:
            queue_of(f"hydra/launcher={launcher}", DETACH)
        assert str(refused.value).startswith(
            "hydra.sweeper.detach=true: only jobs of a"
        )


def test_workers_fill_the_jobs() -> None:
    def workers(*overrides: str) -> tuple[int, int | None]:
        settings = settings_of(SLURM, *overrides)
        return job_workers(sweeper_config(SLURM, *overrides), settings, "slurm")

    fill = "hydra.launcher.workers_per_job=4"
    assert workers() == (1, 1)
    assert workers("hydra.sweeper.n_jobs=3") == (3, 1)
    assert workers(fill) == (1, 4)
    assert workers(fill, "hydra.sweeper.n_jobs=8") == (2, 4)
    with pytest.raises(
        ConfigError, match=r"workers_per_job=4: hydra.sweeper.n_jobs=6 must"
    ):
        workers(fill, "hydra.sweeper.n_jobs=6")
    with pytest.raises(ConfigError, match=r"workers_per_job=0: must be at least 1"):
        workers("hydra.launcher.workers_per_job=0")
    # Python runs on a job's first node alone: the others would idle.
    with pytest.raises(ConfigError, match=r"nodes=2: the workers of a job are on one"):
        workers("hydra.launcher.nodes=2")
    assert workers("hydra.launcher.nodes=null") == (1, 1)
    assert job_workers(sweeper_config(LOCAL), settings_of(LOCAL), "local") == (1, None)


def parameters(*overrides: str) -> dict[str, Any]:
    config = sweeper_config(SLURM, *overrides)
    keys = {
        key: config.hydra.launcher[key]
        for key in (
            "gpus_per_node",
            "gres",
            "gpus_per_task",
            "workers_per_job",
            "signal_delay_s",
            "partition",
            "mem_gb",
        )
    }
    return _parameters(keys, settings_of(SLURM, *overrides), "slurm")


def test_a_job_asks_for_the_gpus_of_its_workers() -> None:
    assert parameters()["gpus_per_node"] == 1
    fill = ("hydra.launcher.workers_per_job=4", "hydra.sweeper.gpus_per_worker=2")
    assert parameters(*fill)["gpus_per_node"] == 8
    assert parameters(*fill, "hydra.launcher.gpus_per_node=6")["gpus_per_node"] == 6
    for other in (NO_GPUS, "hydra.launcher.gres=gpu:h100:4"):
        assert "gpus_per_node" not in parameters(*fill, other)
    asked = parameters("hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=16")
    assert (asked["slurm_partition"], asked["mem_gb"]) == ("gpu", 16)
    assert asked["slurm_additional_parameters"] == {
        "signal": "B:USR2@120",
        "requeue": True,
    }


def test_the_preset_has_all_keys_of_the_plugin() -> None:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    assert set(SlurmQueueConf.__dataclass_fields__) <= set(
        sweeper_config(SLURM).hydra.launcher
    )


def test_queued_jobs_are_described_until_the_study_begins(tmp_path: Path) -> None:
    assert describe_queued(tmp_path) is None
    logs = {number: tmp_path / number for number in ("12_0", "12_1")}
    write_queued(tmp_path, "slurm", logs)
    assert describe_queued(tmp_path) == (
        "no job of it has begun yet (2 Slurm jobs 12_0, 12_1)"
    )
    logs["12_1"].mkdir()
    write_json(logs["12_1"] / OUTCOME, {"exit_code": 1, "error": "no GPU is here"})
    assert describe_queued(tmp_path) == (
        "has not begun, because of an error (1 Slurm job 12_1): no GPU is here"
    )
    write_json(tmp_path / "queued.json", {"queue": "slurm", "jobs": ["11"]})
    assert describe_queued(tmp_path) == "no job of it has begun yet (1 Slurm job 11)"
    write_queued(tmp_path, "local", {"77": tmp_path / "77"})
    assert describe_queued(tmp_path) == "no job of it has begun yet (process 77)"


def test_without_slurm_or_submitit_one_line_says_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), SLURM, "lora.r=choice(4,8)"]
    no_sbatch = "import shutil; shutil.which = lambda name: None"
    ended = station.run(*study, cwd=tmp_path, before=no_sbatch)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: hydra/launcher=slurm: sbatch is not on this machine; "
        "use a login node of the cluster"
    )
    no_submitit = "import sys; sys.modules['submitit'] = None"
    ended = station.run(*study, cwd=tmp_path, before=no_submitit)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        'error: hydra.launcher: needs submitit: pip install "qlora-sweeps[submitit]"'
    )


def queued_study(place: Path, monkeypatch: pytest.MonkeyPatch) -> QueuedStudy:
    """A study of three jobs in a queue that has none of them any more."""
    command = NotifySettings(command=["sh", "-c", f"cd {place}; {TELLS}"])
    folder = place / "s"
    logs = {f"12_{number}": folder / "logs" / f"12_{number}" for number in range(3)}
    for path in logs.values():
        path.mkdir(parents=True)
    in_queue = "sweeps.study.queued_notification.numbers_in_queue"
    monkeypatch.setattr(in_queue, lambda numbers: set())
    study = QueuedStudy("s", folder, command)
    study.begin_session()
    write_queued(folder, "slurm", logs)
    return study


def end(study: QueuedStudy, number: int, code: int, line: str | None) -> None:
    name = f"12_{number}"
    study.end_job(study.folder / "logs" / name, name, code, line)


@pytest.mark.parametrize(
    ("code", "event"), [(1, "failed"), (4, "failed"), (3, "interrupted")]
)
def test_the_last_job_tells_of_an_error_once(
    code: int, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = queued_study(tmp_path, monkeypatch)
    in_queue = "sweeps.study.queued_notification.numbers_in_queue"
    with monkeypatch.context() as queue:
        queue.setattr(in_queue, lambda numbers: numbers)
        end(study, 0, code, "the first one")
        end(study, 1, 0, None)
        assert told(tmp_path) == [], "another job is left"
        end(study, 2, 0, None)
    assert [line[0] for line in told(tmp_path)] == [event]
    assert told(tmp_path)[0][2] == f"study s {event}: the first one"
    # As the command does that waits for them, and a job that Slurm had lost.
    study.tell_error(code, "the first one")
    end(study, 1, code, "late")
    assert len(told(tmp_path)) == 1
    study.begin_session()
    end(study, 0, code, "of the next session")
    assert [line[0] for line in told(tmp_path)] == [event] * 2


def test_jobs_that_were_killed_are_waited_for_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = queued_study(tmp_path, monkeypatch)
    end(study, 1, 1, "no GPU")
    assert [line[0] for line in told(tmp_path)] == ["failed"]


def test_a_job_that_fails_beside_an_answer_is_no_failure_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = queued_study(tmp_path, monkeypatch)
    for _ in range(2):
        study.tell("completed", "2 complete")
    end(study, 0, 1, "no GPU")
    study.tell_error(1, "job 12_0: no GPU")
    assert [line[0] for line in told(tmp_path)] == ["completed"]


def test_a_full_disk_does_not_keep_a_job_from_telling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = queued_study(tmp_path, monkeypatch)

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("sweeps.study.queued_notification.write_json", refuses)
        disk.setattr(Path, "open", refuses)
        end(study, 0, 1, "no space")
    assert [line[0] for line in told(tmp_path)] == ["failed"]


def test_a_job_that_ends_while_the_session_is_queued_tells_its_own_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file still has the jobs of the session before."""
    study = queued_study(tmp_path, monkeypatch)
    for number in range(3):
        end(study, number, 1, "of the session before")
    study.begin_session()
    (study.folder / "logs" / "13_0").mkdir()
    study.end_job(study.folder / "logs" / "13_0", "13_0", 0, None)
    assert len(told(tmp_path)) == 1
    study.end_job(study.folder / "logs" / "13_0", "13_0", 1, "of this one")
    assert told(tmp_path)[1][2] == "study s failed: of this one"


@pytest.mark.parametrize("error", [StorageLost("away"), WorkersLost("25 times")])
def test_a_slurm_job_that_lost_its_database_or_workers_does_not_wait_for_its_end(
    error: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would end it before its time is over."""

    def fails(*_: Any) -> None:
        raise error

    def waits() -> None:
        raise AssertionError("waits for a kill")

    study = queued_study(tmp_path, monkeypatch)
    monkeypatch.setattr(QueuedSession, "_run", fails)
    monkeypatch.setattr("sweeps.queued_session._await_kill", waits)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12_0")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(study.folder / "logs" / "12_0"))
    job = QueuedSession([], StudySweeper, str(tmp_path), None, study)
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        with pytest.raises(type(error)):
            job()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [line[0] for line in told(tmp_path)] == ["interrupted"]


HANDLED = (signal.SIGUSR2, signal.SIGTERM)


def study_of(folder: Path) -> Study:
    return Study.load(folder / "outputs/sweeps/s")


def wait_for(is_met: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < end
        time.sleep(0.2)


def job_log(folder: Path) -> str:
    logs = sorted((folder / "outputs/sweeps/s/.submitit").glob("*/*log.err"))
    return "".join(log.read_text() for log in logs)


def steps_of(folder: Path, trial: int) -> list[int]:
    file = folder / f"outputs/sweeps/s/trials/{trial}/metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if "train/grad_norm" in line]


@pytest.fixture
def ended_jobs(tmp_path: Path) -> Iterator[None]:
    """Ends the processes of local jobs that a failed test has left."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in " ".join(process.info["cmdline"] or []):
            process.kill()


@pytest.mark.slow
def test_a_detached_study_goes_on_alone_to_its_answer(
    station: Station, tiny_base: Path, tmp_path: Path, ended_jobs: None
) -> None:
    more = (LOCAL, DETACH, COMMAND, "hydra.sweeper.n_trials=3", "lora.r=choice(4,8)")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "study s: queued as process " in ended.stderr
    assert "trial 0" not in ended.stderr

    folder = tmp_path / "outputs/sweeps/s"
    shown = station.run("show", "s", cwd=tmp_path, module="sweeps")
    if shown.returncode:
        assert shown.stderr.startswith("error: s: no job of it has begun yet (process")
    wait_for(lambda: any(folder.glob(".submitit/*/outcome.json")))

    assert (folder / "answer.json").exists()
    study = study_of(tmp_path)
    assert len(study.trials(TrialState.COMPLETE, TrialState.PRUNED)) == 3
    ((event, name, message, _),) = told(tmp_path)
    assert (event, name) == ("completed", "s")
    assert message.startswith("study s completed: ")
    shown = station.run("show", "s", cwd=tmp_path, module="sweeps")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_a_job_that_fails_leaves_its_error(
    station: Station, tiny_base: Path, tmp_path: Path, ended_jobs: None
) -> None:
    """A mistake that only the machine of the job shows: a module is not there."""
    more = (LOCAL, DETACH, COMMAND, "hydra.sweeper.n_trials=1", "lora.r=choice(4,8)")
    journal = tmp_path / "outputs/sweeps/s/study.json"
    journal.parent.mkdir(parents=True)
    (journal.parent / "trials").mkdir()
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wait_for(lambda: any(journal.parent.glob(".submitit/*/outcome.json")))
    outcome = json.loads(
        next(journal.parent.glob(".submitit/*/outcome.json")).read_text()
    )
    assert outcome["exit_code"] == 1
    assert "another study's trials are in" in outcome["error"]
    assert f"error: {outcome['error']}" in job_log(tmp_path)
    wait_for(lambda: bool(told(tmp_path)))
    ((event, name, message, _),) = told(tmp_path)
    assert (event, name) == ("failed", "s")
    assert message == f"study s failed: {outcome['error']}"


LONG = ("trainer.max_steps=700", "trainer.save_steps=0", "trainer.save_minutes=60")


def begun_job(station: Station, tiny_base: Path, place: Path) -> psutil.Process:
    """A local job that trains the only trial of a long study."""
    more = (LOCAL, DETACH, COMMAND, "hydra.sweeper.n_trials=1", *LONG)
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    queued = place / "outputs/sweeps/s/queued.json"
    (controller,) = json.loads(queued.read_text())["jobs"]
    wait_for(lambda: len(steps_of(place, 0)) > 5)
    (job,) = children_with("submitit.core._submit", int(controller))
    return job


@pytest.mark.fault
def test_a_detached_job_tells_of_its_interruption(
    station: Station, tiny_base: Path, tmp_path: Path, ended_jobs: None
) -> None:
    begun_job(station, tiny_base, tmp_path).send_signal(signal.SIGTERM)
    wait_for(lambda: bool(told(tmp_path)))
    ((event, _, message, _),) = told(tmp_path)
    assert event == "interrupted"
    assert "the same command with hydra.sweeper.study_name=s goes on" in message


@pytest.mark.fault
def test_a_job_that_is_called_back_writes_checkpoints_and_goes_on(
    station: Station, tiny_base: Path, tmp_path: Path, ended_jobs: None
) -> None:
    """By SIGUSR2, as at the end of its time."""
    job = begun_job(station, tiny_base, tmp_path)
    folder = tmp_path / "outputs/sweeps/s"
    job.send_signal(signal.SIGUSR2)
    wait_for(lambda: any(folder.glob(".submitit/*/outcome.json")))

    assert not psutil.pid_exists(job.pid)
    log = (folder / "trials/0/train.log").read_text()
    assert "resuming after step" in log
    study = study_of(tmp_path)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE]
    # Every step once: nothing was trained again.
    assert steps_of(tmp_path, 0) == list(range(1, 701))
    assert [line[0] for line in told(tmp_path)] == ["completed"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Slurm cluster, which commands of the test find."""
    with running_cluster() as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
        yield cluster


@pytest.mark.slow
def test_a_study_runs_in_slurm_jobs_and_its_command_prints_the_answer(
    cluster: Cluster, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    # Which trial would be pruned depends on the order in which two jobs reach a rung.
    more = (SLURM, NO_GPUS, COMMAND, "hydra/sweeper/pruner=none")
    more = (*more, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr + job_log(tmp_path)
    assert "study s: queued as 2 Slurm jobs " in ended.stderr
    assert "study s: 4 complete" in ended.stderr
    assert [line[0] for line in told(tmp_path)] == ["completed"]
    assert "winner " in ended.stderr
    assert len(study_of(tmp_path).trials(TrialState.COMPLETE)) == 4
    assert (
        len(list((tmp_path / "outputs/sweeps/s").glob(".submitit/*/outcome.json"))) == 2
    )


@pytest.mark.fault
def test_a_preempted_slurm_job_goes_on_where_it_was(
    cluster: Cluster, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    fill = ("hydra.launcher.workers_per_job=2", "hydra.launcher.cpus_per_task=2")
    more = (SLURM, NO_GPUS, DETACH, COMMAND, *fill, "hydra.sweeper.n_trials=2", *LONG)
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wait_for(lambda: all(len(steps_of(tmp_path, trial)) > 5 for trial in (0, 1)))
    cluster.preempt()
    folder = tmp_path / "outputs/sweeps/s"
    results = [folder / f"trials/{trial}/result.json" for trial in (0, 1)]
    wait_for(lambda: all(result.exists() for result in results))
    assert {json.loads(result.read_text())["status"] for result in results} == {
        "interrupted"
    }

    def has_answer() -> bool:
        cluster.begin_again()
        return (folder / "answer.json").exists()

    wait_for(has_answer, 300)
    assert [trial.state for trial in study_of(tmp_path).trials()] == [
        TrialState.COMPLETE
    ] * 2
    for trial in (0, 1):
        assert steps_of(tmp_path, trial) == list(range(1, 701))
    # A preempted job has not ended.
    wait_for(lambda: bool(told(tmp_path)))
    assert [line[0] for line in told(tmp_path)] == ["completed"]


@pytest.mark.fault
def test_cancelled_jobs_tell_of_it_once(
    cluster: Cluster, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (SLURM, NO_GPUS, DETACH, COMMAND, "hydra.sweeper.n_jobs=2")
    more = (*more, "hydra.sweeper.n_trials=2", *LONG)
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wait_for(lambda: all(len(steps_of(tmp_path, trial)) > 5 for trial in (0, 1)))
    cluster.ask("scancel", "--user=root")
    wait_for(lambda: not cluster.ask("squeue", "--noheader").strip())
    assert [line[0] for line in told(tmp_path)] == ["interrupted"]


@pytest.mark.fault
def test_ctrl_c_cancels_the_slurm_jobs(
    cluster: Cluster, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (SLURM, NO_GPUS, COMMAND, "hydra.sweeper.n_trials=1", *LONG)
    process = station.start(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    wait_for(lambda: len(steps_of(tmp_path, 0)) > 5)
    process.send_signal(signal.SIGINT)
    ended = process.wait()
    assert ended.returncode == INTERRUPTED
    assert ended.stderr.splitlines()[-1] == "error: interrupted; its jobs are cancelled"
    wait_for(lambda: not cluster.ask("squeue", "--noheader").strip())
    assert [line[0] for line in told(tmp_path)] == ["interrupted"]
    result = json.loads(
        (tmp_path / "outputs/sweeps/s/trials/0/result.json").read_text()
    )
    assert result["status"] == "interrupted"
