"""Studies on a real PostgreSQL server, which several machines share: here two folders, each with
its own trials."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import study_overrides

from finetune.errors import ConfigError
from finetune.exit_codes import INTERRUPTED
from sweeps.study.errors import StorageLost
from sweeps.study.storage import open_storage
from sweeps.study.study import FINISHED, Study

pytestmark = pytest.mark.fault


def postgres_command(name: str) -> str:
    """One of PostgreSQL's programs."""
    found = [
        shutil.which(name),
        *map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))),
    ]
    paths = [path for path in found if path]
    if not paths:
        pytest.fail("these tests need PostgreSQL's server: apt-get install postgresql")
    return paths[-1]


class Server:
    """A PostgreSQL server of the tests' own; it refuses to run as root, so then it runs as its own
    user."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._as_user:
            shutil.chown(place, "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"postgresql+psycopg2://tester@127.0.0.1:{self.port}/postgres"
        self._data = str(place / "data")
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "trust")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, postgres_command(program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._place)

    def start(self) -> None:
        """Start it, and wait till it answers."""
        at = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._place)]
        serve = [*self._as_user, postgres_command("postgres"), "-D", self._data, *at]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(serve, cwd=self._place, **quiet)
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OperationalError):
                create_engine(self.address).connect().close()
                return
            assert time.monotonic() < end, "PostgreSQL does not start"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it as a crash does."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")
        self._process.wait(30)

    def cut_connections(self) -> int:
        """End all connections but this one; returns their number."""
        cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity"
        others = "backend_type = 'client backend' and pid <> pg_backend_pid()"
        with create_engine(self.address, poolclass=NullPool).connect() as connection:
            return int(connection.execute(text(f"{cut} where {others}")).scalar_one())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    place = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    server = Server(place)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(place)


@pytest.fixture
def database(server: Server) -> str:
    return server.address


def command(tiny_base: Path, name: str, *more: str) -> list[str]:
    storage = "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}"
    return [*study_overrides(tiny_base, name), storage, *more]


def with_address(database: str) -> str:
    """What a command's process runs first: the address comes from its environment."""
    return f"import os; os.environ['STUDY_DATABASE'] = {database!r}"


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
        "hydra.sweeper.n_trials=9",
        "trainer.max_steps=12",
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
    assert [trial.number for trial in study.finished()] == list(range(9))
    assert not study.trials(TrialState.FAIL)
    one, two = (numbers_in(machine, "shared") for machine in machines)
    assert one | two == set(range(9))
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


def test_a_machine_that_was_lost_takes_its_trial_on_when_it_is_back(
    database: str,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost, other = tmp_path / "lost", tmp_path / "other"
    more = (
        "hydra.sweeper.n_trials=4",
        "trainer.max_steps=60",
        "trainer.save_steps=1",
        "hydra/sweeper/pruner=none",
    )
    arguments = command(tiny_base, "lost", *more)
    running = station.start(
        *arguments, cwd=lost, before=with_address(database) + SLOW_STEPS
    )
    kill_in_its_first_trial(lost, "lost", running)

    ended = station.run(*arguments, cwd=other, before=with_address(database))
    assert ended.returncode == 0, ended.stderr
    study = study_of(other, "lost", monkeypatch, database)
    assert [trial.number for trial in study.trials(TrialState.RUNNING)] == [0], (
        "another machine's trial was taken"
    )
    assert numbers_in(other, "lost") == {1, 2, 3}

    ended = station.run(*arguments, cwd=lost, before=with_address(database))
    assert ended.returncode == 0, ended.stderr
    assert (
        "resuming after step"
        in (lost / "outputs/sweeps/lost/trials/0/train.log").read_text()
    )
    assert len(study_of(lost, "lost", monkeypatch, database).trials(*FINISHED)) == 4


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


@pytest.mark.parametrize("slots", [1, 2])
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
    server: Server, tmp_path: Path
) -> None:
    storage = open_storage(server.address, tmp_path, retry_seconds=1.0)
    storage.get_all_studies()
    server.stop()
    try:
        with pytest.raises(StorageLost, match="stays out of reach"):
            storage.get_all_studies()
        began = time.monotonic()
        with pytest.raises(StorageLost):
            storage.get_all_studies()
        assert time.monotonic() - began < 0.5
    finally:
        server.start()
    storage.get_all_studies()
    server.cut_connections()
    storage.get_all_studies()


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
