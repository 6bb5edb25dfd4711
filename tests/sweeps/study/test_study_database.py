"""Studies on a real PostgreSQL server, which several machines share: here two folders, each with its own trials."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import study_overrides

from sweeps.study.study import FINISHED, Study

pytestmark = pytest.mark.fault


def postgres_command(name: str) -> str:
    """One of PostgreSQL's programs."""
    found = [shutil.which(name), *map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))]
    paths = [path for path in found if path]
    if not paths:
        pytest.fail("these tests need PostgreSQL's server: apt-get install postgresql")
    return paths[-1]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the tests' own; it refuses to run as root, so then it runs as its own user."""
    place = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if as_user:
        shutil.chown(place, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(place / "data")
    make = [*as_user, postgres_command("initdb"), "-D", data, "-U", "tester", "-A", "trust"]
    subprocess.run(make, check=True, capture_output=True, cwd=place)
    serve = [*as_user, postgres_command("postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(place)]
    address = f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place)
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OperationalError):
                create_engine(address).connect().close()
                break
            assert time.monotonic() < end, "PostgreSQL does not start"
            time.sleep(0.1)
        yield address
    finally:
        stop = [*as_user, postgres_command("pg_ctl"), "-D", data, "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, capture_output=True, cwd=place)
        server.wait(30)
        shutil.rmtree(place)


def command(tiny_base: Path, name: str, *more: str) -> list[str]:
    storage = "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}"
    return [*study_overrides(tiny_base, name), storage, *more]


def with_address(database: str) -> str:
    """What a command's process runs first: the address comes from its environment."""
    return f"import os; os.environ['STUDY_DATABASE'] = {database!r}"


def numbers_in(machine: Path, name: str) -> set[int]:
    folders = (machine / "outputs" / "sweeps" / name / "trials").glob("*/result.json")
    return {int(path.parent.name) for path in folders}


def study_of(machine: Path, name: str, monkeypatch: pytest.MonkeyPatch, database: str) -> Study:
    monkeypatch.setenv("STUDY_DATABASE", database)
    return Study.load(machine / "outputs" / "sweeps" / name)


def kill_in_its_first_trial(machine: Path, name: str, running: Forked) -> None:
    """Once it has a checkpoint."""
    checkpoints = machine / "outputs" / "sweeps" / name / "trials" / "0" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("checkpoint-*/progress.json")), running)
    running.kill()
    assert not (checkpoints.parent / "result.json").exists(), "killed too late"


def test_two_machines_share_a_study(
    database: str, station: Station, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = [tmp_path / "one", tmp_path / "two"]
    more = ("hydra.sweeper.n_trials=9", "trainer.max_steps=12", "hydra/sweeper/pruner=median")
    started = [
        station.start(*command(tiny_base, "shared", *more), cwd=machine, before=with_address(database) + SLOW_STEPS)
        for machine in machines
    ]
    ended = [running.wait() for running in started]

    assert [done.returncode for done in ended] == [0, 0], "\n".join(done.stderr for done in ended)
    study = study_of(machines[0], "shared", monkeypatch, database)
    assert [trial.number for trial in study.finished()] == list(range(9))
    assert not study.trials(TrialState.FAIL)
    one, two = (numbers_in(machine, "shared") for machine in machines)
    assert one | two == set(range(9))
    assert not one & two
    assert one
    assert two
    winner = study.ranked()[0].number
    (home,) = [machine for machine, own in zip(machines, (one, two), strict=True) if winner in own]
    other = next(machine for machine in machines if machine != home)
    assert (home / "outputs/sweeps/shared/best/adapter").is_dir()
    again = station.start("best", "shared", cwd=other, module="sweeps", before=with_address(database)).wait()
    assert f"trial {winner} wins; its machine has it" in again.stderr
    for machine in machines:
        text = "".join(path.read_text() for path in machine.rglob("*.json"))
        assert "127.0.0.1" not in text


def test_a_machine_that_was_lost_takes_its_trial_on_when_it_is_back(
    database: str, station: Station, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, other = tmp_path / "lost", tmp_path / "other"
    more = ("hydra.sweeper.n_trials=4", "trainer.max_steps=60", "trainer.save_steps=1", "hydra/sweeper/pruner=none")
    arguments = command(tiny_base, "lost", *more)
    running = station.start(*arguments, cwd=lost, before=with_address(database) + SLOW_STEPS)
    kill_in_its_first_trial(lost, "lost", running)

    ended = station.run(*arguments, cwd=other, before=with_address(database))
    assert ended.returncode == 0, ended.stderr
    study = study_of(other, "lost", monkeypatch, database)
    assert [trial.number for trial in study.trials(TrialState.RUNNING)] == [0], "another machine's trial was taken"
    assert numbers_in(other, "lost") == {1, 2, 3}

    ended = station.run(*arguments, cwd=lost, before=with_address(database))
    assert ended.returncode == 0, ended.stderr
    assert "going on from step" in (lost / "outputs/sweeps/lost/trials/0/train.log").read_text()
    assert len(study_of(lost, "lost", monkeypatch, database).trials(*FINISHED)) == 4


def test_a_killed_study_on_sqlite_goes_on(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=3", "trainer.max_steps=40", "trainer.save_steps=1", "hydra/sweeper/pruner=none")
    arguments = [*study_overrides(tiny_base, "s"), "hydra.sweeper.storage=sqlite:///trials.db", *more]
    running = station.start(*arguments, cwd=tmp_path, before=SLOW_STEPS)
    kill_in_its_first_trial(tmp_path, "s", running)

    ended = station.run(*arguments, cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert "going on from step" in (tmp_path / "outputs/sweeps/s/trials/0/train.log").read_text()
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/sweeps/s/trials/*/result.json")]
    assert [result["status"] for result in results] == ["completed"] * 3
