"""Studies on a real PostgreSQL server, which several machines share: here two folders, each with
its own trials."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy import create_engine, event, text
from sqlalchemy.pool import NullPool
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import study_overrides
from support.matrix import further
from support.postgres import PASSWORD, Server, with_address

from finetune.errors import ConfigError
from finetune.exit_codes import INTERRUPTED
from sweeps.study.errors import StorageLost
from sweeps.study.retry import Retry
from sweeps.study.storage import open_storage
from sweeps.study.study import Study

pytestmark = pytest.mark.fault


def command(tiny_base: Path, name: str, *more: str) -> list[str]:
    storage = "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}"
    return [*study_overrides(tiny_base, name), storage, *more]


def numbers_in(machine: Path, name: str) -> set[int]:
    folders = (machine / "outputs" / "sweeps" / name / "trials").glob("*/result.json")
    return {int(path.parent.name) for path in folders}


def study_of(
    machine: Path, name: str, monkeypatch: pytest.MonkeyPatch, database: str
) -> Study:
    monkeypatch.setenv("STUDY_DATABASE", database)
    return Study.load(machine / "outputs" / "sweeps" / name)


def kill_in_its_first_trial(machine: Path, name: str, running: Forked) -> None:
    """Once it has a checkpoint."""
    checkpoints = machine / "outputs" / "sweeps" / name / "trials" / "0" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("checkpoint-*/progress.json")), running)
    running.kill()
    assert not (checkpoints.parent / "result.json").exists(), "killed too late"


def test_two_machines_share_a_study(
    database: str,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = [tmp_path / "one", tmp_path / "two"]
    more = (
        "hydra.sweeper.n_trials=6",
        "trainer.max_steps=9",
        "hydra/sweeper/pruner=median",
    )
    started = [
        station.start(
            *command(tiny_base, "shared", *more),
            cwd=machine,
            before=with_address(database) + SLOW_STEPS,
        )
        for machine in machines
    ]
    ended = [running.wait() for running in started]

    assert [done.returncode for done in ended] == [0, 0], "\n".join(
        done.stderr for done in ended
    )
    study = study_of(machines[0], "shared", monkeypatch, database)
    assert [trial.number for trial in study.finished()] == list(range(6))
    assert not study.trials(TrialState.FAIL)
    one, two = (numbers_in(machine, "shared") for machine in machines)
    assert one | two == set(range(6))
    assert not one & two
    assert one
    assert two
    winner = study.ranked()[0].number
    (home,) = [
        machine
        for machine, own in zip(machines, (one, two), strict=True)
        if winner in own
    ]
    other = next(machine for machine in machines if machine != home)
    assert (home / "outputs/sweeps/shared/best/adapter").is_dir()
    again = station.start(
        "best", "shared", cwd=other, module="sweeps", before=with_address(database)
    ).wait()
    assert (
        f"trial {winner} wins; run `python -m sweeps best` on the machine that has its folder"
        in again.stderr
    )
    for machine in machines:
        text = "".join(path.read_text() for path in machine.rglob("*.json"))
        assert "127.0.0.1" not in text


@pytest.mark.parametrize("shared", [True, False])
def test_the_trial_of_a_lost_machine_goes_on_elsewhere(
    shared: bool,
    server: Server,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its last checkpoint if the folder is shared, else from the start."""
    name = f"lost{shared}"
    lost, other = tmp_path / "lost", tmp_path / ("lost" if shared else "other")
    more = (
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.lost_after=30",
        "trainer.max_steps=20",
        "trainer.save_steps=1",
        "hydra/sweeper/pruner=none",
    )
    arguments = command(tiny_base, name, *more)
    before = with_address(server.address)
    running = station.start(
        *arguments, cwd=lost, before=before + SLOW_STEPS + as_machine("lost")
    )
    kill_in_its_first_trial(lost, name, running)
    folder = lost / "outputs/sweeps" / name / "trials/0"
    log = (folder / "train.log").read_text()
    server.silence()

    ended = station.run(*arguments, cwd=other, before=before + as_machine("other"))

    assert ended.returncode == 0, ended.stderr
    study = study_of(other, name, monkeypatch, server.address)
    states = [(trial.number, trial.state) for trial in study.trials()]
    assert states == [(0, TrialState.COMPLETE), (1, TrialState.COMPLETE)]
    assert numbers_in(other, name) == {0, 1}
    assert [len(trial.user_attrs["starts"]) for trial in study.trials()] == [2, 1]
    goes_on = study.trials()[0].user_attrs["starts"][1] > 0
    assert goes_on == shared
    if shared:
        new_log = (folder / "train.log").read_text().removeprefix(log)
        assert "resuming after step" in new_log
    steps = [
        json.loads(line)["step"]
        for line in (study.folder_of(0).path / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert steps == list(range(1, 21)), "steps were lost, or trained twice"


def as_machine(name: str) -> str:
    """What a command's process runs first, so that it counts as one on another machine."""
    return f"\nimport sweeps.study.leases; sweeps.study.leases.MACHINE = {name!r}\n"


def test_the_password_of_the_environment_reaches_no_file_log_or_title(
    server: Server,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    address = server.add_password_user()
    more = (
        f"hydra.sweeper.storage={address}",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "tracker=wandb",
        "tracker.mode=offline",
    )
    arguments = [*study_overrides(tiny_base, "secret"), *more]
    work = tmp_path / "work"
    running = station.start(*arguments, cwd=work, environment={"PGPASSWORD": PASSWORD})
    titles = set()
    while running.poll() is None:
        titles |= set(map(title_of, Path("/proc").glob("[0-9]*")))
        time.sleep(0.2)
    ended = running.wait()

    assert ended.returncode == 0, ended.stderr
    assert any("wandb" in path.name for path in work.rglob("*.wandb"))
    secret = PASSWORD.encode()
    said = (ended.stdout + ended.stderr).encode()
    assert not any(secret in text for text in {said, *titles})
    holders = [path for path in work.rglob("*") if path.is_file()]
    assert not [path for path in holders if secret in path.read_bytes()]


def test_the_password_is_read_from_the_users_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.add_password_user()
    (tmp_path / ".pgpass").write_text(f"127.0.0.1:*:*:*:{PASSWORD}\n")
    (tmp_path / ".pgpass").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_storage(address, tmp_path).get_all_studies() is not None


def title_of(process: Path) -> bytes:
    """The command line of a process; none of one that has just ended."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_wrong_password_is_said_in_one_line_without_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.add_password_user()
    monkeypatch.setenv("PGPASSWORD", "wrong-horse")

    with pytest.raises(ConfigError) as refused:
        open_storage(address, tmp_path)

    message = str(refused.value)
    assert message.startswith(f"hydra.sweeper.storage: {address} can't be opened")
    assert "password authentication failed" in message
    assert "wrong-horse" not in message
    assert len(message.splitlines()) == 1


def test_a_killed_study_on_sqlite_goes_on(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=3",
        "trainer.max_steps=40",
        "trainer.save_steps=1",
        "hydra/sweeper/pruner=none",
    )
    arguments = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.storage=sqlite:///trials.db",
        *more,
    ]
    running = station.start(*arguments, cwd=tmp_path, before=SLOW_STEPS)
    kill_in_its_first_trial(tmp_path, "s", running)

    ended = station.run(*arguments, cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert (
        "resuming after step"
        in (tmp_path / "outputs/sweeps/s/trials/0/train.log").read_text()
    )
    results = [
        json.loads(path.read_text())
        for path in tmp_path.glob("outputs/sweeps/s/trials/*/result.json")
    ]
    assert [result["status"] for result in results] == ["completed"] * 3


SIX_TRIALS = (
    "hydra.sweeper.n_trials=6",
    "trainer.max_steps=8",
    "trainer.save_steps=2",
    "hydra/sweeper/pruner=none",
)


def test_a_study_outlives_lost_connections_and_a_restart_of_its_server(
    server: Server,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = [tmp_path / "one", tmp_path / "two"]
    arguments = command(tiny_base, "cut", *SIX_TRIALS, "hydra.sweeper.slots=2")
    before = f"{with_address(server.address)}\n{SLOW_STEPS}"
    started = [
        station.start(*arguments, cwd=machine, before=before) for machine in machines
    ]

    def cut_often() -> None:
        for _ in range(20):
            server.cut_connections()
            time.sleep(0.1)

    wait_until(
        lambda: any(list(machine.rglob("checkpoint-*")) for machine in machines),
        started[0],
    )
    cut_often()
    wait_until(
        lambda: any(numbers_in(machine, "cut") for machine in machines), started[0]
    )
    server.stop()
    time.sleep(3)
    server.start()
    cut_often()
    ended = [running.wait() for running in started]

    assert [run.returncode for run in ended] == [0, 0], "\n".join(
        run.stderr for run in ended
    )
    study = study_of(machines[0], "cut", monkeypatch, server.address)
    assert [(trial.number, trial.state) for trial in study.trials()] == [
        (n, TrialState.COMPLETE) for n in range(6)
    ]
    one, two = (numbers_in(machine, "cut") for machine in machines)
    assert one | two == set(range(6))
    assert not one & two
    assert any("is out of reach" in run.stderr for run in ended)


@pytest.mark.parametrize("slots", [2, *further(1)])
def test_a_server_that_stays_away_ends_the_worker_and_its_trials_go_on_later(
    slots: int,
    server: Server,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"away{slots}"
    sizes = (
        "hydra.sweeper.n_trials=3",
        "trainer.max_steps=40",
        "trainer.save_steps=1",
        "hydra/sweeper/pruner=none",
    )
    arguments = command(tiny_base, name, *sizes, f"hydra.sweeper.slots={slots}")
    impatient = (
        "import sweeps.study.database; sweeps.study.database.RETRY_SECONDS = 2.0"
    )
    before = f"{with_address(server.address)}\n{impatient}\n{SLOW_STEPS}"
    running = station.start(*arguments, cwd=tmp_path, before=before)
    folder = tmp_path / "outputs/sweeps" / name
    wait_until(
        lambda: any(
            folder.glob(f"trials/{slots - 1}/checkpoints/checkpoint-*/progress.json")
        ),
        running,
    )
    server.stop()
    try:
        ended = running.wait()
    finally:
        server.start()

    assert ended.returncode == INTERRUPTED
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: hydra.sweeper.storage: postgresql+psycopg2://tester@127.0.0.1"
    )
    assert last.endswith(
        f"the same command with hydra.sweeper.study_name={name} goes on"
    )
    study = study_of(tmp_path, name, monkeypatch, server.address)
    assert [trial.number for trial in study.trials(TrialState.RUNNING)] == list(
        range(slots)
    )
    assert not study.finished()

    again = station.run(*arguments, cwd=tmp_path, before=with_address(server.address))
    assert again.returncode == 0, again.stderr
    for number in range(slots):
        assert (
            "resuming after step" in (folder / f"trials/{number}/train.log").read_text()
        )
    assert [trial.number for trial in study.trials(TrialState.COMPLETE)] == [0, 1, 2]


@pytest.fixture
def losing_answers(
    server: Server, tmp_path: Path
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A storage, and what makes the answer to its next commit get lost: the commit happens, the
    connection ends."""
    storage: Any = open_storage(server.address, tmp_path)
    engine = storage._backend.engine
    armed: list[bool] = []

    def commit(connection: Any) -> None:
        if armed:
            armed.clear()
            driver = connection.connection.driver_connection
            driver.commit()
            driver.cursor().execute(
                "select 1"
            )  # a transaction, so that SQLAlchemy's own commit asks the server
            server.cut_connections()

    event.listen(engine, "commit", commit)
    yield storage, lambda: armed.append(True)
    assert not armed
    engine.dispose()


def test_a_write_whose_answer_got_lost_is_not_done_twice(
    losing_answers: tuple[Any, Callable[[], None]],
) -> None:
    storage, lose_next = losing_answers
    lose_next()
    study = optuna.create_study(
        study_name="answers", storage=storage, load_if_exists=True
    )
    waiting = create_trial(state=TrialState.WAITING)
    waiting.number = 0
    lose_next()
    trial = storage.create_new_trial(study._study_id, waiting)
    assert [known.number for known in study.trials] == [0]

    lose_next()
    assert storage.set_trial_state_values(trial, TrialState.RUNNING) is True
    assert storage.set_trial_state_values(trial, TrialState.RUNNING) is False, (
        "another worker's call"
    )
    lose_next()
    storage.set_trial_param(
        trial, "x", 0.5, optuna.distributions.FloatDistribution(0, 1)
    )
    lose_next()
    storage.set_trial_intermediate_value(trial, 1, 2.5)
    lose_next()
    storage.set_trial_user_attr(trial, "steps", 3)
    lose_next()
    assert storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.25]) is True
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, TrialState.FAIL)

    (known,) = study.trials
    assert (known.state, known.values, known.params) == (
        TrialState.COMPLETE,
        [0.25],
        {"x": 0.5},
    )
    assert (known.intermediate_values, known.user_attrs) == ({1: 2.5}, {"steps": 3})


def test_after_a_loss_calls_are_tried_once_until_one_succeeds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pause(retry: Retry) -> None:
        raise AssertionError("it is tried again")

    storage = open_storage(server.address, tmp_path, retry_seconds=1.0)
    storage.get_all_studies()
    server.stop()
    try:
        with pytest.raises(StorageLost, match="stays out of reach"):
            storage.get_all_studies()
        with monkeypatch.context() as patch:
            patch.setattr(Retry, "pause", no_pause)
            with pytest.raises(StorageLost):
                storage.get_all_studies()
    finally:
        server.start()
    storage.get_all_studies()
    server.cut_connections()
    storage.get_all_studies()


def test_a_process_keeps_one_connection(server: Server, tmp_path: Path) -> None:
    """A server has a hundred, unless it is told otherwise."""
    ours = "select count(*) from pg_stat_activity where backend_type = 'client backend'"

    def count() -> int:
        with create_engine(server.address, poolclass=NullPool).connect() as connection:
            return int(connection.execute(text(ours)).scalar_one())

    def settled() -> int:
        """The server ends a closed connection's process a moment later."""
        counts: list[int] = []
        while len(counts) < 4 or len(set(counts[-4:])) > 1:
            time.sleep(0.25)
            counts.append(count())
        return counts[-1]

    before = settled()
    storage: Any = open_storage(server.address, tmp_path)
    calls = [threading.Thread(target=storage.get_all_studies) for _ in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert settled() == before + 1
    storage._backend.engine.dispose()


def test_an_address_without_a_driver_is_opened_by_the_one_that_is_installed(
    server: Server, tmp_path: Path
) -> None:
    storage: Any = open_storage(server.address.replace("+psycopg2", ""), tmp_path)

    assert storage.get_all_studies() is not None


def test_a_server_that_is_not_there_is_said_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        open_storage(
            "postgresql+psycopg2://me:hunter2horse@127.0.0.1:1/x",
            tmp_path,
            retry_seconds=1.0,
        )

    assert "postgresql+psycopg2://me@127.0.0.1:1/x can't be opened" in str(
        refused.value
    )
    assert "hunter2horse" not in str(refused.value)
