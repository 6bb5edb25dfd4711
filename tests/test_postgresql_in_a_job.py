"""docs/postgresql_in_a_job.sh: a server that lives as long as a command or a job."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.commands import Station
from support.configs import study_overrides
from support.postgres import as_server_user, postgres_command, server_folder

SCRIPT = Path(__file__).resolve().parent.parent / "docs/postgresql_in_a_job.sh"

PASSWORD = "correct-horse-battery"

PSQL = postgres_command("psql")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the server's user, with a copy of the script."""
    folder = server_folder()
    shutil.copy(SCRIPT, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the script on the folder's database; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **environment: str) -> "subprocess.Popen[str]":
        words = [*as_server_user(), "bash", str(place / SCRIPT.name), str(place / "db")]
        process = subprocess.Popen(
            [*words, *command],
            env={**os.environ, "PGPASSWORD": PASSWORD, **environment},
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def servers(place: Path) -> list[str]:
    lines = [
        " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
    ]
    return [line for line in lines if f"-D {place}/db" in line]


def wait_for_address(place: Path) -> str:
    end = time.monotonic() + 120
    while not (place / "db.address").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    return (place / "db.address").read_text().strip()


def sql(statement: str) -> tuple[str, ...]:
    script = f'{PSQL} -w "$STUDY_DATABASE" -v ON_ERROR_STOP=1 -tAc "{statement}"'
    return ("bash", "-c", script)


@pytest.mark.slow
def test_a_command_has_the_database_as_long_as_it_runs(
    start: Callable[..., "subprocess.Popen[str]"], place: Path
) -> None:
    code, _, error = said(start(*sql("create table t as select 7 as x")))
    assert code == 0, error
    assert not servers(place)
    assert not (place / "db.address").exists()

    # The data is there again, and the command's exit code is the script's.
    code, out, error = said(start(*sql("select x from t")))
    assert (code, out.strip()) == (0, "7"), error
    assert said(start("bash", "-c", "exit 7"))[0] == 7
    for file in (place / "db.log", place / "db/pg_hba.conf"):
        assert PASSWORD not in file.read_text()


@pytest.mark.slow
def test_the_server_asks_for_the_password_and_listens_on_this_host_only(
    start: Callable[..., "subprocess.Popen[str]"], place: Path
) -> None:
    process = start()
    address = wait_for_address(place)
    assert "127.0.0.1" in address
    assert PASSWORD not in address

    def ask(**environment: str) -> "subprocess.CompletedProcess[str]":
        command = [PSQL, "-w", address, "-tAc", "show unix_socket_directories"]
        env = {key: value for key, value in os.environ.items() if key != "PGPASSWORD"}
        return subprocess.run(
            command, env={**env, **environment}, capture_output=True, text=True
        )

    assert "no password supplied" in ask().stderr
    assert "authentication failed" in ask(PGPASSWORD="wrong").stderr
    answered = ask(PGPASSWORD=PASSWORD)
    assert (answered.returncode, answered.stdout.strip()) == (0, "")
    port = int(address.rpartition(":")[2].partition("/")[0])
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    code, _, error = said(start("true"))
    assert (code, error) == (1, f"error: {place}/db is in use by another server\n")

    os.kill(_script_of(process).pid, signal.SIGTERM)
    said(process)
    assert not servers(place)


@pytest.mark.slow
def test_it_listens_under_the_name_of_the_host_that_it_runs_on(
    start: Callable[..., "subprocess.Popen[str]"], place: Path
) -> None:
    """A job's host is not the one on which it was queued."""
    (place / "hostname").write_text("#!/bin/sh\necho localhost\n")
    (place / "hostname").chmod(0o755)
    path = f"{place}:{os.environ['PATH']}"
    command = ("bash", "-c", "echo $STUDY_DATABASE")
    code, out, error = said(start(*command, LISTEN="this_host", PATH=path))
    assert code == 0, error
    assert out.startswith("postgresql://studies@localhost:")


def _script_of(process: "subprocess.Popen[str]") -> psutil.Process:
    """The script's process: `runuser` stands before it as root."""
    children = psutil.Process(process.pid).children() if os.getuid() == 0 else []
    return children[0] if children else psutil.Process(process.pid)


@pytest.mark.fault
def test_the_server_ends_where_the_script_is_killed(
    start: Callable[..., "subprocess.Popen[str]"], place: Path
) -> None:
    process = start()
    wait_for_address(place)
    os.kill(_script_of(process).pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while servers(place):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(
    start: Callable[..., "subprocess.Popen[str]"], place: Path
) -> None:
    code, _, error = said(start("true", PGPASSWORD=""))
    assert code == 1
    assert "PGPASSWORD: must be set" in error
    assert said(start("true"))[0] == 0
    code, _, error = said(start("true", PGPASSWORD="another"))
    line = f"error: PGPASSWORD is not the one that {place}/db was made with\n"
    assert (code, error) == (1, line)
    assert not servers(place)


@pytest.mark.slow
def test_a_study_is_stored_there(
    start: Callable[..., "subprocess.Popen[str]"],
    place: Path,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = start()
    monkeypatch.setenv("STUDY_DATABASE", wait_for_address(place))
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    study = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}",
    ]
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 complete" in ended.stderr
    os.kill(_script_of(process).pid, signal.SIGTERM)
    said(process)
